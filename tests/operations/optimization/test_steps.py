"""Steps: what they bring is chained, failures are recorded, and a finished one is never taken again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omgoptim.errors import TechniqueError
from omgoptim.models.report_file import write_sealed
from omgoptim.operations.context import RunContext, StepRun
from omgoptim.operations.ledger import Ledger
from omgoptim.operations.live_objects import Live
from omgoptim.operations.optimization.steps import Steps
from omgoptim.reports import EfficiencyReport, Environment, Gains, Measurement
from omgoptim.requests import OptimizeRequest, Request

ENVIRONMENT = Environment(cpu="c", threads=1, python="p", versions={}, seed=0)


class Runs:
    """Stands for the job layer: each step leaves a run folder with the report it was told to leave."""

    def __init__(self, root: Path, results: list[dict[str, Any] | Exception]) -> None:
        self.root, self.results, self.asked = root, results, []  # type: ignore[var-annotated]

    def __call__(self, verb: str, request: Request, live: Live, span: tuple[float, float]) -> StepRun:
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
            gains=Gains(speedup=result["speedup"], quality_drop=0.0, quality_drop_high=result.get("high", 0.0)),
        )  # fmt: skip
        write_sealed(folder / "report.json", folder.name, report)
        return StepRun(folder.name, folder, report)


def steps_with(tmp_path: Path, runs: Runs) -> Steps:
    mine = tmp_path / "runs" / "optimize-1"
    mine.mkdir(parents=True, exist_ok=True)
    context = RunContext(mine, "optimize-1", tmp_path, "python", "a test", lambda *_: None, run_step=runs)
    request = OptimizeRequest(model="net.py:build", data="net.py:load", max_quality_drop=0.02, checkpoint="w.pt")
    return Steps(request, context, Live(), Ledger(mine / "ledger.jsonl"), deadline=1e18)


FIRST = {"before": 0.95, "after": 0.94, "size": 500, "speedup": 2.0, "high": 0.004}
SECOND = {"before": 0.94, "after": 0.935, "size": 125, "speedup": 3.0}


def test_a_chain_multiplies_speedups_and_counts_its_drop_from_the_original(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, SECOND])
    steps = steps_with(tmp_path, runs)
    first = steps.take("prune 50%", "prune", {"pruning_ratio": 0.5, "epochs": 1}, None, (0, 1))
    assert first is not None
    second = steps.take("quantize", "quantize", {}, first, (0, 1), expected_speedup=5.0)
    assert second is not None
    assert (second.speedup, second.size_bytes) == (6.0, 125)
    assert second.drop == pytest.approx(0.015)
    assert first.cautious_drop == pytest.approx(0.014)
    assert second.chain == [first, second]
    record = steps.records()[1]
    assert (record.parent, record.expected_speedup, record.run_id) == ("prune 50%", 5.0, "quantize-2")


def test_the_original_is_built_by_its_checkpoint_and_an_artifact_by_itself(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, SECOND])
    steps = steps_with(tmp_path, runs)
    first = steps.take("prune 50%", "prune", {"epochs": 1}, None, (0, 1))
    steps.take("quantize", "quantize", {}, first, (0, 1))
    (_, original, live), (_, artifact, _) = runs.asked
    assert (original.model, original.checkpoint) == ("net.py:build", "w.pt")
    assert (artifact.model, artifact.checkpoint) == (str(tmp_path / "runs" / "prune-1" / "artifact"), None)
    assert original.timing == "quick"
    assert live.resplit is not None


def test_a_step_that_is_in_the_ledger_is_read_and_not_taken_again(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, TechniqueError("nothing can be removed", "all layers are tied")])
    begun = steps_with(tmp_path, runs)
    first = begun.take("prune 50%", "prune", {"epochs": 1}, None, (0, 1))
    assert begun.take("prune 75%", "prune", {"epochs": 1, "pruning_ratio": 0.75}, None, (0, 1)) is None
    again = steps_with(tmp_path, runs)
    read = again.take("prune 50%", "prune", {"epochs": 1}, None, (0, 1))
    assert again.take("prune 75%", "prune", {"epochs": 1, "pruning_ratio": 0.75}, None, (0, 1)) is None
    assert len(runs.asked) == 2
    assert read is not None
    assert first is not None
    assert (read.run.run_id, read.speedup, read.drop, read.seconds) == (
        first.run.run_id, first.speedup, first.drop, pytest.approx(first.seconds, abs=0.01),
    )  # fmt: skip
    (failed,) = again.failed
    assert (failed.status, failed.why) == ("failed", "nothing can be removed: all layers are tied")


def test_other_settings_are_another_step(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [FIRST, FIRST])
    steps = steps_with(tmp_path, runs)
    steps.take("a", "prune", {"epochs": 1}, None, (0, 1))
    steps.take("b", "prune", {"epochs": 2}, None, (0, 1))
    assert len(runs.asked) == 2
