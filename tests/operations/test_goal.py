"""A goal says which of its targets a measurement misses, the furthest first."""

from __future__ import annotations

from omgoptim.operations.goal import Goal
from omgoptim.reports import Measurement
from omgoptim.requests import OptimizeRequest

MEASURED = Measurement(runtime="onnxruntime", size_bytes=6_000_000, latency_ms_p50=16.0, peak_memory_bytes=90_000_000)


def test_targets_are_in_the_units_of_their_names() -> None:
    asked = OptimizeRequest(model="m", target_latency_ms=8, target_size_mb=5, target_memory_mb=100)
    missed = Goal.of(asked).missed(MEASURED)
    assert [str(one) for one in missed] == ["latency 16 ms, target 8 ms", "size 6 MB, target 5 MB"]
    assert [one.factor for one in missed] == [2.0, 1.2]


def test_without_a_target_nothing_is_missed_and_what_was_not_measured_is_not_missed() -> None:
    assert Goal.of(OptimizeRequest(model="m")).missed(MEASURED) == []
    unknown = Measurement(runtime="onnxruntime")
    assert Goal.of(OptimizeRequest(model="m", target_latency_ms=1)).missed(unknown) == []
