"""Speed targets: the share of each round, targets that count as reached, and one that no widths reach."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import omgoptim
from omgoptim.operations.prune import steps_of
from omgoptim.operations.rounds import speed_target as speed_goal
from omgoptim.operations.rounds.speed_target import PrunedWidths, SpeedGoal, missed_speed
from omgoptim.operations.rounds.speed_target import _best as best
from omgoptim.requests import PruneRequest, parse
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._latency.latency_table import LayerTimes, Side, TimeTable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def steps(**arguments: object) -> list[Any]:
    return list(steps_of(cast(PruneRequest, parse("prune", {"model": "net.py:build", **arguments}))))


def test_a_speedup_is_shared_among_rounds_on_the_scale_of_log_time() -> None:
    amounts = [step.amount for step in steps(target_speedup=4, rounds=2, schedule="linear")]
    assert amounts == pytest.approx([0.5, 0.75])


def test_operations_are_shared_in_the_same_way() -> None:
    found = steps(target_macs_ratio=4, rounds=2, schedule="linear")
    assert [step.params.target_macs_ratio for step in found] == pytest.approx([2, 4])


def test_a_latency_is_a_fraction_of_what_the_original_was_measured_to_take() -> None:
    assert SpeedGoal(None, 2.0, 1.0).fraction(original_ms=8.0) == 0.25
    assert SpeedGoal(None, 2.0, 0.5).fraction(original_ms=8.0) == 0.5
    assert SpeedGoal(2.0, None, 1.0).fraction(original_ms=8.0) == 0.5


def test_the_gentlest_cut_that_holds_is_taken_and_the_fastest_if_none_does() -> None:
    attempts = [PrunedWidths({"a": 8}, 0.6), PrunedWidths({"a": 4}, 0.3), PrunedWidths({"a": 6}, 0.45)]
    assert best(attempts, target=0.5).widths == {"a": 6}
    assert best(attempts, target=0.1).widths == {"a": 4}


@pytest.mark.parametrize(
    ("speedup", "high", "missed"),
    [(2.1, 2.2, False), (1.97, 2.05, False), (1.97, 1.99, True), (1.9, 2.4, True), (None, None, False)],
)
def test_a_speedup_counts_as_reached_where_the_goal_lies_within_the_noise(
    speedup: float | None, high: float | None, missed: bool
) -> None:
    measured = cast(Any, SimpleNamespace(gains=SimpleNamespace(speedup=speedup, speedup_high=high)))
    assert (missed_speed(Structured(target_speedup=2.0), measured) is not None) == missed


@pytest.mark.slow
def test_a_speed_beyond_reach_ends_with_the_best_that_was_found_and_why(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_launch = dataclasses.replace(speed_goal.SEARCH_TIMING, launches=1, most_launches=1, rounds=2)
    monkeypatch.setattr(speed_goal, "SEARCH_TIMING", one_launch)
    report = omgoptim.prune(
        "net.py:net", checkpoint="net.pt", data="net.py:load", runtime="onnxruntime", target_speedup=90, epochs=0,
        rounds=2, timing="quick", max_quality_drop=1,
    )  # fmt: skip
    assert report.outcome == "guard_failed"
    assert "is not reachable" in report.summary
    assert report.artifact is not None
    assert report.after is not None
    assert report.before is not None
    assert (report.after.params or 0) < (report.before.params or 0)


def test_a_target_below_what_the_layers_can_take_is_tried_once_at_the_narrowest_widths() -> None:
    layer = LayerTimes("conv", Side(1), Side(0, (("conv", 1),)), (1,), (1, 2, 4), ((1.0, 1.5, 3.0),))
    table = TimeTable("torch_eager", {"conv": 4}, {"conv": (1, 2, 4)}, (layer,))
    importance = {"conv": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    tried: list[dict[str, int]] = []

    def measured_at(number: int, widths: dict[str, int]) -> float:
        assert number == len(tried)
        tried.append(widths)
        return 0.8

    attempts = speed_goal._attempts(table, importance, 0.9, 0.1, measured_at)
    assert tried[-1] == {"conv": 1}
    assert tried.count({"conv": 1}) == 1
    assert attempts[-1].fraction == 0.8
