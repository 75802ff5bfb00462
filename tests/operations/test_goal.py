"""A goal says which of its targets a measurement misses, the furthest first."""

from __future__ import annotations

from omgoptim.operations.goal import Goal, time_target
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Measurement
from omgoptim.requests import OptimizeRequest, PruneRequest, SearchRequest
from omgoptim.requests.prune import Structured

MEASURED = Measurement(runtime="onnxruntime", size_bytes=6_000_000, latency_ms_p50=16.0, peak_memory_bytes=90_000_000)


def test_targets_are_in_the_units_of_their_names() -> None:
    asked = OptimizeRequest(model="m", target_latency_ms=8, target_size_mb=5, target_memory_mb=100)
    missed = Goal.of(asked).missed(MEASURED, 0.0)
    assert [str(one) for one in missed] == ["latency 16 ms, target 8 ms", "size 6 MB, target 5 MB"]
    assert [one.factor for one in missed] == [2.0, 1.2]


def test_without_a_target_nothing_is_missed_and_what_was_not_measured_is_not_missed() -> None:
    assert Goal.of(OptimizeRequest(model="m")).missed(MEASURED, 0.0) == []
    unknown = Measurement(runtime="onnxruntime")
    assert Goal.of(OptimizeRequest(model="m", target_latency_ms=1)).missed(unknown, 0.0) == []


def test_a_latency_of_an_overloaded_machine_is_not_a_miss() -> None:
    asked = OptimizeRequest(model="m", target_latency_ms=8, target_size_mb=5)
    assert [one.name for one in Goal.of(asked).missed(MEASURED, OVERLOADED + 0.01)] == ["size"]


def test_a_time_target_of_any_verb_is_named() -> None:
    assert time_target(OptimizeRequest(model="m", target_latency_ms=8)) == "a latency of 8 ms"
    assert time_target(SearchRequest(model="m", data="d", target_speedup=3)) == "a speedup of 3x"
    assert time_target(PruneRequest(model="m", method=Structured(target_speedup=2.5))) == "a speedup of 2.5x"
    assert time_target(OptimizeRequest(model="m", target_size_mb=5)) is None
