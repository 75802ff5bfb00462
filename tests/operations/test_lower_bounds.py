"""Targets that no compression reaches are refused, with the nearest one that is not ruled out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from omgoptim.errors import RequestError
from omgoptim.operations.goal import Goal, LowerBound, refuse_below_bounds, refuse_unreachable_size

FLOORS = [LowerBound("onnxruntime", 0.02, 60_000_000, 250), LowerBound("openvino", 0.05, 90_000_000, 200)]


@dataclass
class Sized:
    """Stands for a loaded model, of which only the parameters count here."""

    params: tuple[int, int] | None


@pytest.mark.parametrize(
    ("goal", "what", "fix"),
    [
        (Goal(0.01, latency_ms=0.01), "no model reaches 0.01 ms", "at least 0.024 ms"),
        (Goal(0.01, memory_bytes=5e7), "no model runs within 50 MB", "at least 72 MB"),
        (Goal(0.01, size_bytes=100), "no model fits into 0.0001 MB", "at least 0.00024 MB"),
    ],
)
def test_a_target_below_every_engine_is_refused(goal: Goal, what: str, fix: str) -> None:
    with pytest.raises(RequestError, match=what) as refused:
        refuse_below_bounds(goal, FLOORS)
    assert fix in refused.value.fix


def test_a_target_that_one_engine_may_reach_is_not_refused() -> None:
    refuse_below_bounds(Goal(0.01, latency_ms=0.03, memory_bytes=7e7, size_bytes=210), FLOORS)
    refuse_below_bounds(Goal(0.01, latency_ms=1e-9), [])


def test_a_size_below_four_bits_a_parameter_is_refused_only_where_nothing_can_be_trained() -> None:
    goal, model = Goal(0.01, size_bytes=4e6), Sized((10_000_000, 10_000_000))
    with pytest.raises(RequestError, match="does not fit into 4 MB") as refused:
        refuse_unreachable_size(goal, model, "a program cannot be trained")  # type: ignore[arg-type]
    assert refused.value.why == "10,000,000 parameters in 4 bits each are 5 MB; a program cannot be trained"
    assert "at least 6 MB" in refused.value.fix
    refuse_unreachable_size(goal, model, None)  # type: ignore[arg-type]
    refuse_unreachable_size(Goal(0.01, size_bytes=5.1e6), model, "a program cannot be trained")  # type: ignore[arg-type]
