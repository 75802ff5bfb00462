"""The chain: the better route goes on, to the deepest level that a full recovery keeps within the guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omgoptim.models.report_file import write_signed_report
from omgoptim.operations.context import RunContext, StepRun
from omgoptim.operations.goal import Goal
from omgoptim.operations.ledger import Ledger
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.optimization.chain import StepChain, quantize_alone
from omgoptim.operations.optimization.cost import StepTimes
from omgoptim.operations.optimization.level_speeds import LevelSpeeds
from omgoptim.operations.optimization.steps import Steps
from omgoptim.operations.quantization.selection import Preference
from omgoptim.reports import EfficiencyReport, Environment, Epoch, Gains, Measurement, Training
from omgoptim.requests import OptimizeRequest, Request

ENVIRONMENT = Environment(cpu="c", threads=1, python="p", versions={}, seed=0)
GUARD = 0.02


class World:
    """Stands for the job layer: a model whose drop is a function of level and epochs, and whose steps take seconds."""

    def __init__(
        self, root: Path, holds: float, *, distill_drop: float = 0.5, short_drop: float = 0.03, epoch_s: float = 1.0
    ) -> None:
        self.root, self.holds, self.distill_drop, self.epoch_s = root, holds, distill_drop, epoch_s
        self.short_drop, self.now = short_drop, 0.0
        self.asked: list[tuple[str, float, int]] = []
        self.multiples: set[int | None] = set()

    def __call__(self, key: str, verb: str, request: Request, live: Live, span: tuple[float, float]) -> StepRun:
        raw: dict[str, Any] = request.model_dump()
        epochs = raw.get("epochs") or 0
        level = 0.0
        before = 0.95
        if verb == "prune":
            level = raw["method"]["pruning_ratio"]
            self.multiples.add(raw["method"]["round_to"])
            drop = 0.0 if level <= self.holds else self.short_drop if epochs <= 1 else 0.025
        elif verb == "distill":
            level, drop = 1 - raw["student"]["width"], self.distill_drop
            self.multiples.add(raw["student"]["round_to"])
        else:
            drop = 0.001
        training = None
        if epochs:
            one = Epoch(round=1, epoch=1, loss=1, quality=None, learning_rate=0.1, seconds=1, best=True)
            training = Training(
                optimizer="adamw", loss="l", trained_params=1, total_params=1, seconds=epochs * self.epoch_s,
                epochs=[one.model_copy(update={"epoch": number + 1}) for number in range(epochs)],
            )  # fmt: skip
        self.asked.append((verb, round(level, 3), epochs))
        self.now += 10 + epochs * self.epoch_s
        folder = self.root / f"{verb}-{len(self.asked)}"
        (folder / "artifact").mkdir(parents=True)
        report = EfficiencyReport(
            outcome="ok", summary="s", verb=verb, run_id=folder.name, request={}, environment=ENVIRONMENT, repeat="r",
            before=Measurement(runtime="torch_eager", quality=before, size_bytes=1000),
            after=Measurement(runtime="onnxruntime", quality=before - drop, size_bytes=500),
            gains=Gains(speedup=2.0 + level, quality_drop=drop, quality_drop_high=drop), training=training,
        )  # fmt: skip
        write_signed_report(folder / "report.json", folder.name, report)
        return StepRun(folder.name, folder, report)


def chained(tmp_path: Path, world: World, budget_s: float, speeds: LevelSpeeds = LevelSpeeds()) -> Steps:  # noqa: B008
    mine = tmp_path / "runs" / "optimize-1"
    mine.mkdir(parents=True)
    context = RunContext(mine, "optimize-1", tmp_path, "python", "a test", lambda *_: None, run_step=world)
    request = OptimizeRequest(model="net.py:build", data="net.py:load", max_quality_drop=GUARD)
    ledger = Ledger(mine / "ledger.jsonl")
    steps = Steps(request, context, Live(), ledger, budget_s, clock=lambda: world.now)
    assert quantize_alone(steps) is not None
    StepChain(steps, Goal(GUARD), StepTimes(1.0, 1.0, 0.1, world.epoch_s), Preference("balanced", 1000), speeds).build()
    return steps


def test_the_level_is_bisected_in_short_and_then_in_full_until_a_recovery_holds(tmp_path: Path) -> None:
    world = World(tmp_path / "runs", holds=0.4)
    chained(tmp_path, world, 1e6)
    full = [level for verb, level, epochs in world.asked if verb == "prune" and epochs > 1]
    assert full == sorted(full[:1]) + full[1:]
    assert max(level for level in full if level <= 0.4) > 0.3
    assert world.asked[-1][0] == "quantize"
    assert len(full) <= 4


def test_nothing_is_begun_that_would_end_past_the_budget(tmp_path: Path) -> None:
    for budget_s in (15, 25, 35, 50, 80, 200):
        world = World(tmp_path / str(budget_s) / "runs", holds=0.6)
        steps = chained(tmp_path / str(budget_s), world, budget_s)
        assert world.now <= budget_s
        made = [verb for verb, _, _ in world.asked]
        assert made[0] == "quantize"
        assert made.count("quantize") >= 2 or budget_s < 40
        assert budget_s > 40 or any("no time" in step.why for step in steps.without_result)


def test_a_long_epoch_leaves_fewer_epochs_and_time_to_quantize(tmp_path: Path) -> None:
    world = World(tmp_path / "runs", holds=0.9, epoch_s=20.0)
    chained(tmp_path, world, 600)
    longest = max(epochs for _, _, epochs in world.asked)
    assert 2 <= longest < 40
    assert world.now <= 600
    assert world.asked[-1][0] == "quantize"


def test_levels_leave_time_for_a_full_recovery(tmp_path: Path) -> None:
    for budget_s in (90, 120, 160):
        world = World(tmp_path / str(budget_s) / "runs", holds=0.9)
        chained(tmp_path / str(budget_s), world, budget_s)
        assert [epochs for verb, _, epochs in world.asked if verb == "prune" and epochs > 1]
        assert world.asked[-1][0] == "quantize"


def test_the_route_that_lost_less_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path / "runs", holds=0.1, distill_drop=0.0, short_drop=0.2)
    chained(tmp_path, world, 1e6)
    assert {verb for verb, _, epochs in world.asked if epochs > 1} == {"distill"}


@pytest.mark.parametrize("holds", [0.0, 0.05])
def test_where_no_level_holds_the_chain_ends(tmp_path: Path, holds: float) -> None:
    world = World(tmp_path / "runs", holds=holds)
    steps = chained(tmp_path, world, 1e6)
    assert all(point.cautious_drop > GUARD for point in steps.taken if point.verb == "prune")


def speeds(quantized: list[float], **more: float) -> LevelSpeeds:
    """Speeds at levels 0, 0.25, 0.5, 0.75 and 0.875 whose sizes fall with the level."""
    return LevelSpeeds(1.0, [0.0, 0.25, 0.5, 0.75, 0.875], [1.0, 1.2, 1.5, 2.0, 2.2], quantized, [400] * 5, **more)


def test_a_level_that_is_no_faster_untrained_is_never_trained(tmp_path: Path) -> None:
    world = World(tmp_path / "runs", holds=0.9)
    chained(tmp_path, world, 1e6, speeds([4.0, 5.0, 5.0, 9.0, 9.1]))
    assert {level for verb, level, _ in world.asked if verb == "prune"} == {0.25, 0.75}


def test_what_untrained_networks_gave_is_what_is_expected_of_the_steps(tmp_path: Path) -> None:
    world = World(tmp_path / "runs", holds=0.6)
    steps = chained(tmp_path, world, 1e6, speeds([4.0, 5.0, 6.0, 9.0, 12.0]))
    expected = {point.name: point.expected_speedup for point in steps.taken}
    assert expected["prune 50%"] == 1.5
    assert expected["quantize after prune 50%"] == 6.0


@pytest.mark.parametrize("multiple", [None, 16])
def test_every_level_is_trained_at_the_multiple_of_widths_that_was_better(tmp_path: Path, multiple: int | None) -> None:
    world = World(tmp_path / "runs", holds=0.6)
    chained(tmp_path, world, 1e6, LevelSpeeds(round_to=multiple))
    assert world.multiples == {multiple}
    assert {"prune", "distill"} <= {verb for verb, _, _ in world.asked}


@pytest.mark.parametrize(("factor", "tried"), [(0.8, False), (1.2, True)])
def test_factors_are_trained_where_untrained_ones_were_better(tmp_path: Path, factor: float, tried: bool) -> None:
    world = World(tmp_path / "runs", holds=0.6)
    chained(tmp_path, world, 1e6, speeds([4.0, 5.0, 6.0, 9.0, 12.0], factorized=factor, factorized_size=1.1))
    verbs = [verb for verb, _, _ in world.asked]
    assert ("factorize" in verbs) == tried
    assert not tried or verbs[-2:] == ["factorize", "quantize"]
