"""Which points are measured in full, and which of them is delivered."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from omgoptim.measure.timing import Ratio, Timing
from omgoptim.operations.final_measurement import FinalRace, TimedEntry
from omgoptim.operations.goal import Goal
from omgoptim.operations.optimization import final_choice
from omgoptim.operations.optimization.final_choice import DeliveryOrder, is_slower, pick_finalists
from omgoptim.operations.optimization.points import StepResult
from omgoptim.operations.quantization.selection import Preference
from omgoptim.reports import Measurement

GOAL = Goal(0.01, None, None, None)


def point(name: str, speedup: float, size: int, drop: float = 0.0, parent: StepResult | None = None) -> StepResult:
    return StepResult(name, "quantize", cast(Any, None), Path(name), parent, speedup, 1.0, size, 1.0, drop, drop, 1.0)


def timing(speedup: float, half: float | None = 0.1) -> Timing:
    low, high = (None, None) if half is None else (speedup - half, speedup + half)
    return Timing(1.0, 1.0, None, None, Ratio(speedup, low, high), None, 5)


def first(
    monkeypatch: pytest.MonkeyPatch, prefer: str, points: list[StepResult], timings: list[Timing], load: float = 0.0
) -> str:
    """Name of the point that is delivered."""
    sizes = {one.artifact: one.size_bytes for one in points}
    monkeypatch.setattr(final_choice, "measurement", lambda *_: None)
    monkeypatch.setattr(Goal, "missed", lambda *_: [])
    monkeypatch.setattr(final_choice.Manifest, "read", lambda path: SimpleNamespace(size_bytes=sizes[path]))
    order = DeliveryOrder(cast(Any, SimpleNamespace(bench=None)), GOAL, Preference(cast(Any, prefer), 1000))
    timed = [TimedEntry(one, own, Path("outputs")) for one, own in zip(points, timings, strict=True)]
    race = FinalRace(timing(1.0), Path("outputs"), load, timed, [])
    places = {one.name: order.place(one, own, race) for one, own in zip(points, timings, strict=True)}
    assert json.dumps(list(places.values()))  # plain numbers
    return order.order(race)[0].entry.name


def test_the_balanced_choice_is_not_slower_than_quantization_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = point("prune", 2.0, 400)
    alone, small, good = point("alone", 9, 250), point("small", 8, 20, parent=pruned), point("good", 12, 100, 0, pruned)
    timings = [timing(9), timing(8), timing(12)]
    assert first(monkeypatch, "balanced", [alone, small, good], timings) == "good"  # small: 8 x 50 is more than 12 x 10
    assert first(monkeypatch, "balanced", [alone, small], timings[:2]) == "alone"
    assert first(monkeypatch, "size", [alone, small, good], timings) == "small"
    assert first(monkeypatch, "balanced", [alone, small, good], timings, load=1.0) == "small"  # times mean nothing


def test_an_interval_that_overlaps_is_not_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, small = point("alone", 9, 250), point("small", 8.9, 20, parent=point("prune", 2.0, 400))
    assert first(monkeypatch, "balanced", [alone, small], [timing(9), timing(8.9)]) == "small"


def test_quantization_alone_outside_the_guard_is_no_measure_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, small = point("alone", 9, 250, drop=0.5), point("small", 8, 20, parent=point("prune", 2.0, 400))
    assert first(monkeypatch, "balanced", [alone, small], [timing(9), timing(8)]) == "small"


def test_slower_needs_intervals() -> None:
    assert is_slower(timing(8), [timing(9), timing(5)])
    assert not is_slower(timing(8), [timing(8.1)])
    assert not is_slower(timing(8, None), [timing(9)])
    assert not is_slower(timing(8), [timing(9, None)])
    assert not is_slower(timing(8), [])


def test_the_fastest_the_best_alone_and_the_safest_are_always_measured() -> None:
    pruned = point("prune", 2.0, 400, drop=0.005)
    alone = point("alone", 9, 250, drop=0.002)
    small = point("small", 8, 20, 0.009, pruned)
    fast = point("fast", 12, 240, 0.008, pruned)
    safe = point("safe", 1.5, 900, -0.01, pruned)
    more = [point(f"more {size}", 8, size, 0.009, pruned) for size in (21, 22, 23)]
    points = [pruned, alone, small, fast, safe, *more]
    chosen = pick_finalists(points, GOAL, Preference("balanced", 1000), [alone], 5)
    assert [one.name for one in chosen] == ["small", "more 21", "fast", "alone", "safe"]
    few = pick_finalists(points, GOAL, Preference("balanced", 1000), [alone], 1)
    assert [one.name for one in few] == ["small", "fast", "alone", "safe"]


def test_points_that_meet_the_targets_are_measured_before_better_ones_that_miss_them() -> None:
    points = [point(name, 8, size) for name, size in (("small", 20), ("medium", 30), ("light", 200))]
    for one, memory in zip(points, (90_000_000, 70_000_000, 40_000_000), strict=True):
        one.measured = Measurement(runtime="onnxruntime", size_bytes=one.size_bytes, peak_memory_bytes=memory)
    preference = Preference("size", 1000)
    plain = pick_finalists(points, GOAL, preference, [points[0]], 1)
    assert [one.name for one in plain] == ["small"]
    in_memory = pick_finalists(points, Goal(0.01, memory_bytes=50_000_000), preference, [points[0]], 1)
    assert [one.name for one in in_memory] == ["light", "small"]
    nearest = pick_finalists(points[:2], Goal(0.01, memory_bytes=50_000_000), preference, [points[0]], 1)
    assert [one.name for one in nearest] == ["medium", "small"]


def test_a_latency_of_a_busy_machine_does_not_decide_which_points_are_measured() -> None:
    busy, goal = point("busy", 8, 20), Goal(0.01, latency_ms=1.0)
    busy.measured = Measurement(runtime="onnxruntime", latency_ms_p50=4.0)
    assert busy.overshoot(goal) == 4.0
    busy.speedup = None
    assert busy.overshoot(goal) == 1.0
