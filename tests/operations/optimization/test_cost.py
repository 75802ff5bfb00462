"""What steps are expected to take: estimated first, then by what the first step of the kind took."""

from __future__ import annotations

from pathlib import Path

import pytest

from omgoptim.operations.context import StepRun
from omgoptim.operations.optimization.cost import StepTimes, measured_once
from omgoptim.operations.optimization.points import StepResult
from omgoptim.reports import EfficiencyReport, Environment, Epoch, Training

COST = StepTimes(prepared_s=5.0, load_s=2.0, launch_s=0.5, epoch_s=3.0)


def point(verb: str, seconds: float, epochs: int = 0, training_s: float = 0.0) -> StepResult:
    training = None
    if epochs:
        one = Epoch(round=1, epoch=1, loss=1, quality=None, learning_rate=0.1, seconds=1, best=True)
        training = Training(
            optimizer="adamw", loss="l", trained_params=1, total_params=1, seconds=training_s, epochs=[one] * epochs
        )
    environment = Environment(cpu="c", threads=1, python="p", versions={}, seed=0)
    report = EfficiencyReport(
        outcome="ok", summary="s", verb=verb, run_id="r", request={}, environment=environment, repeat="r",
        training=training,
    )  # fmt: skip
    run = StepRun("r", Path("r"), report)
    return StepResult(verb, verb, run, Path("r"), None, 1.0, 1.0, 1, 0.9, 0.0, 0.0, seconds)


def test_before_any_step_the_estimate_is_from_one_launch_and_one_epoch() -> None:
    assert COST.quantize_s([]) == 2.0 + 16 * 0.5
    assert COST.trained_s([], 10) == 2.0 + 4 * 0.5 + 30.0


def test_after_a_step_of_the_kind_the_estimate_is_what_that_took() -> None:
    taken = [point("quantize", 40.0), point("prune", 12.0, epochs=2, training_s=4.0), point("quantize", 25.0)]
    assert COST.quantize_s(taken) == 40.0
    assert COST.trained_s(taken, 10) == 8.0 + 10 * 2.0
    taken.append(point("prune", 9.0, epochs=1, training_s=3.0))
    assert COST.trained_s(taken, 10) == 8.0 + 10 * 3.0


def test_a_cost_is_measured_once_and_read_by_a_run_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "cost.json"
    assert measured_once(file, StepTimes, lambda: COST) == COST
    assert measured_once(file, StepTimes, lambda: pytest.fail("it was measured again")) == COST
    file.write_text("{torn")
    assert measured_once(file, StepTimes, lambda: COST) == COST


def test_there_are_as_many_finalists_as_the_time_left_launches_twice() -> None:
    assert COST.finalists(left_s=100.0, most=5) == 5
    assert COST.finalists(left_s=4.0, most=5) == 3
    assert COST.finalists(left_s=0.0, most=5) == 2
