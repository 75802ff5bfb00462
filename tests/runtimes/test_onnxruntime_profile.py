"""Node times from ONNX Runtime's profile, with events written by hand."""

from __future__ import annotations

import pytest

from omgoptim.runtimes.engine import MAX_PROFILED, MIN_PROFILED, WARM_UP, medians, profiled_calls
from omgoptim.runtimes.onnxruntime import node_times_of


def kernel(name, start, duration, op="Add"):
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": start,
        "dur": duration,
        "args": {"op_name": op},
    }


RUN = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 1}


def times_of(*calls):
    events = [event for call in calls for event in (*call, RUN)]
    return {time.name: time.ms for time in node_times_of(events)}


def test_a_nodes_time_is_the_median_of_the_calls_after_the_first_ones():
    slow = [[kernel("a", 0, 9000)]] * WARM_UP
    assert times_of(*slow, *([kernel("a", 0, us)] for us in (1000, 5000, 2000))) == {"a": 2.0}


def test_a_loop_has_its_own_time_only_and_its_body_that_of_all_its_turns():
    call = [
        kernel("inside", 10, 300),
        kernel("inside", 400, 500),
        kernel("loop", 0, 1000, "Loop"),
        kernel("b", 1000, 7),
    ]
    assert times_of(*[call] * (WARM_UP + 1)) == pytest.approx({"inside": 0.8, "loop": 0.2, "b": 0.007})


def test_what_is_no_kernel_is_no_node():
    assert times_of(*[[{"cat": "Node", "name": "a_fence_before", "ts": 0, "dur": 5}]] * 4) == {}


def test_a_kind_is_the_engines_operator():
    events = [event for _ in range(WARM_UP + 1) for event in (kernel("a", 0, 1, "QLinearConv"), RUN)]
    assert [(time.name, time.kind) for time in node_times_of(events)] == [("a", "QLinearConv")]


def test_profiled_calls_are_some_to_warm_up_then_a_few_at_least_and_not_without_end():
    assert list(profiled_calls(0.0)) == [False] * WARM_UP + [True] * MIN_PROFILED
    assert sum(profiled_calls(1e9)) == MAX_PROFILED


def test_medians_are_over_the_calls_that_have_the_entry():
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0, "b": 9.0}
