"""Steps: what they bring is chained, failures are recorded, and a finished one is never taken again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from omgoptim.errors import SetupError, TechniqueError
from omgoptim.models.report_file import write_signed_report
from omgoptim.operations.context import RunContext, StepRun
from omgoptim.operations.ledger import Ledger
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.optimization.points import speeds
from omgoptim.operations.optimization.steps import PARALLEL, SECONDS_FILE, PlannedStep, Steps
from omgoptim.reports import EfficiencyReport, Environment, Gains, Measurement, OutputRecord
from omgoptim.requests import OptimizeRequest, Request

ENVIRONMENT = Environment(cpu="c", threads=1, python="p", versions={}, seed=0)


class Runs:
    """Stands for the job layer: each step leaves a run folder with the report it was told to leave."""

    def __init__(self, root: Path, results: list[dict[str, Any] | Exception]) -> None:
        self.root, self.results, self.asked = root, results, []  # type: ignore[var-annotated]

    def __call__(self, key: str, verb: str, request: Request, live: Live, span: tuple[float, float]) -> StepRun:
        self.asked.append((verb, request, live))
        result = self.results[len(self.asked) - 1]
        if isinstance(result, Exception):
            raise result
        folder = self.root / f"{verb}-{len(self.asked)}"
        (folder / "artifact").mkdir(parents=True)
        report = EfficiencyReport(
            outcome="ok", summary="s", verb=verb, run_id=folder.name, request={}, environment=ENVIRONMENT, repeat="r",
            before=Measurement(runtime="torch_eager", quality=result["before"], size_bytes=1000),
            after=Measurement(runtime="onnxruntime", quality=result["after"], size_bytes=result["size"]),
            gains=Gains(speedup=result["speedup"], macs_ratio=result.get("macs"),
                        quality_drop=0.0, quality_drop_high=result.get("high", 0.0)),
            outputs=result.get("outputs", []),
        )  # fmt: skip
        write_signed_report(folder / "report.json", folder.name, report)
        return StepRun(folder.name, folder, report)


def steps_with(tmp_path: Path, runs: Runs, budget_s: float = 1e9, clock: Callable[[], float] = lambda: 0.0) -> Steps:
    mine = tmp_path / "runs" / "optimize-1"
    mine.mkdir(parents=True, exist_ok=True)
    context = RunContext(mine, "optimize-1", tmp_path, "python", "a test", lambda *_: None, run_step=runs)
    request = OptimizeRequest(model="net.py:build", data="net.py:load", max_quality_drop=0.02, checkpoint="w.pt")
    return Steps(request, context, Live(), Ledger(mine / "ledger.jsonl"), budget_s=budget_s, clock=clock)


FIRST = {"before": 0.95, "after": 0.94, "size": 500, "speedup": 2.0, "high": 0.004}
SECOND = {"before": 0.94, "after": 0.935, "size": 125, "speedup": 3.0}


def test_a_chain_multiplies_speedups_and_counts_its_drop_from_the_original(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, SECOND])
    steps = steps_with(tmp_path, runs)
    first = steps.take(PlannedStep("prune 50%", "prune", {"pruning_ratio": 0.5, "epochs": 1}, None))
    assert first is not None
    second = steps.take(PlannedStep("quantize", "quantize", {}, first, expected_speedup=5.0))
    assert second is not None
    assert (second.speedup, second.size_bytes) == (6.0, 125)
    assert second.drop == pytest.approx(0.015)
    assert first.cautious_drop == pytest.approx(0.014)
    assert second.chain == [first, second]
    record = steps.records()[1]
    assert (record.parent, record.expected_speedup, record.run_id) == ("prune 50%", 5.0, "quantize-2")


def test_a_result_with_a_ruined_output_is_above_any_guard_though_the_metric_lost_nothing(tmp_path: Path) -> None:
    boxes = OutputRecord(
        name="boxes", shape=["batch", 4], dtype="float32", kind="values", evidence="", compared_by="r2_agreement",
        ruined=True,
    )  # fmt: skip
    scores = boxes.model_copy(update={"name": "scores", "ruined": False, "labelled": True})
    runs = Runs(tmp_path / "runs", [FIRST | {"outputs": [boxes, scores]}, FIRST | {"outputs": [scores]}])
    steps = steps_with(tmp_path, runs)
    ruined = steps.take(PlannedStep("prune 50%", "prune", {"epochs": 1}, None))
    kept = steps.take(PlannedStep("prune 25%", "prune", {"epochs": 2}, None))
    assert ruined is not None
    assert kept is not None
    assert (ruined.ruined, kept.ruined) == (True, False)
    assert kept.cautious_drop < 1.0 < ruined.cautious_drop


def test_the_original_is_built_by_its_checkpoint_and_an_artifact_by_itself(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, SECOND])
    steps = steps_with(tmp_path, runs)
    first = steps.take(PlannedStep("prune 50%", "prune", {"epochs": 1}, None))
    steps.take(PlannedStep("quantize", "quantize", {}, first))
    (_, original, live), (_, artifact, _) = runs.asked
    assert (original.model, original.checkpoint) == ("net.py:build", "w.pt")
    assert (artifact.model, artifact.checkpoint) == (str(tmp_path / "runs" / "prune-1" / "artifact"), None)
    assert original.timing == "quick"
    assert live.resplit is not None


def test_a_step_that_is_in_the_ledger_is_read_and_not_taken_again(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, TechniqueError("nothing can be removed", "all layers are tied")])
    begun = steps_with(tmp_path, runs)
    first = begun.take(PlannedStep("prune 50%", "prune", {"epochs": 1}, None))
    assert begun.take(PlannedStep("prune 75%", "prune", {"epochs": 1, "pruning_ratio": 0.75}, None)) is None
    again = steps_with(tmp_path, runs)
    read = again.take(PlannedStep("prune 50%", "prune", {"epochs": 1}, None))
    assert again.take(PlannedStep("prune 75%", "prune", {"epochs": 1, "pruning_ratio": 0.75}, None)) is None
    assert len(runs.asked) == 2
    assert read is not None
    assert first is not None
    assert (read.run.run_id, read.speedup, read.drop, read.seconds) == (
        first.run.run_id, first.speedup, first.drop, pytest.approx(first.seconds, abs=0.01),
    )  # fmt: skip
    (failed,) = again.without_result
    assert (failed.status, failed.why) == ("failed", "nothing can be removed: all layers are tied")


def test_other_settings_are_another_step(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, FIRST])
    steps = steps_with(tmp_path, runs)
    steps.take(PlannedStep("a", "prune", {"epochs": 1}, None))
    steps.take(PlannedStep("b", "prune", {"epochs": 2}, None))
    assert len(runs.asked) == 2


def test_a_step_that_would_end_past_the_budget_is_not_begun_and_says_so(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, SECOND])
    steps = steps_with(tmp_path, runs, budget_s=100, clock=count(0, 60).__next__)  # each step takes 60 s
    first = steps.take(PlannedStep("a", "prune", {"epochs": 1}, None, expected_seconds=90))
    assert (first is not None, steps.seconds_left) == (True, 40)
    assert steps.take(PlannedStep("b", "prune", {"epochs": 2}, None, expected_seconds=41)) is None
    assert len(runs.asked) == 1
    (left_out,) = steps.without_result
    assert (left_out.status, left_out.seconds) == ("skipped", None)
    assert left_out.why == "no time: about 41 s needed, 40 s left of the budget"
    assert steps.take(PlannedStep("c", "prune", {"epochs": 2}, None, expected_seconds=40)) is not None


def test_a_run_that_goes_on_has_as_much_time_left_as_if_it_had_not_been_cut_off(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, TechniqueError("no")])
    for seconds in (60, 1):
        steps = steps_with(tmp_path, runs, 1000, count(0, seconds).__next__)
        steps.take(PlannedStep("a", "prune", {"epochs": 1}, None))
        steps.take(PlannedStep("b", "prune", {"epochs": 2}, None))
        assert steps.seconds_left == 880
    assert len(runs.asked) == 2


def test_a_step_that_failed_by_the_machine_is_taken_again_and_one_by_the_model_is_not(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [SetupError("the disk is full"), TechniqueError("no"), FIRST])
    for _ in range(2):
        steps = steps_with(tmp_path, runs)
        full = steps.take(PlannedStep("a", "prune", {"epochs": 1}, None))
        steps.take(PlannedStep("b", "prune", {"epochs": 2}, None))
    assert full is not None
    assert len(runs.asked) == 3


def test_where_a_speed_is_not_known_all_are_compared_by_their_work(tmp_path: Path) -> None:
    pruned = {"before": 0.95, "after": 0.94, "size": 500, "speedup": None, "macs": 4.0}
    quantized = {"before": 0.95, "after": 0.95, "size": 250, "speedup": 3.0}
    runs = Runs(tmp_path / "runs", [pruned, quantized, {**SECOND, "after": 0.94}])
    steps = steps_with(tmp_path, runs)
    first = steps.take(PlannedStep("prune", "prune", {"epochs": 1}, None))
    other = steps.take(PlannedStep("quantize", "quantize", {}, None))
    chained = steps.take(PlannedStep("quantize after", "quantize", {}, first))
    assert first is not None
    assert other is not None
    assert chained is not None
    assert speeds([first, other, chained]) == [4.0, 1.0, 4.0]
    assert speeds([other]) == [3.0]
    assert chained.speedup is None
    assert steps.records()[0].speedup is None
    assert [record.on_front for record in steps.records()] == [False, True, True]


def test_another_model_or_other_data_under_the_same_name_is_another_step(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, FIRST, FIRST])
    for model, data in (("a", "x"), ("b", "x"), ("b", "y"), ("a", "x")):
        steps = steps_with(tmp_path, runs)
        steps.model, steps.data = model, data
        steps.take(PlannedStep("a", "prune", {"epochs": 1}, None))
    assert len(runs.asked) == 3


def test_a_step_that_a_worker_trained_goes_on_from_its_checkpoints_and_costs_its_seconds(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST])
    begun = tmp_path / "runs" / "prune-0"
    (begun / "checkpoints" / "round-1").mkdir(parents=True)
    steps = steps_with(tmp_path, runs, budget_s=100.0)
    steps.context = replace(steps.context, begin_step=lambda *_: begun)
    key, _ = steps.named(PlannedStep("prune", "prune", {"max_quality_drop": 1.0}))
    made = steps.context.checkpoints / PARALLEL / key
    (made / "checkpoints" / "round-1" / "done").mkdir(parents=True)
    (made / "checkpoints" / "round-1" / "done" / "state.json").write_text("{}")
    (made / SECONDS_FILE).write_text("40.5")
    point = steps.take(PlannedStep("prune", "prune", {"max_quality_drop": 1.0}, None))
    assert point is not None
    assert (begun / "checkpoints" / "round-1" / "done" / "state.json").read_text() == "{}"
    assert (point.seconds, steps.seconds_left) == (40.5, 59.5)
