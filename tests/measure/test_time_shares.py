"""Time by kind of layer: sums, shares, and what they bound."""

from __future__ import annotations

import pytest

from omgoptim.measure.kernels import speedup_bound, time_shares


def test_times_of_a_kind_add_up_and_integers_stay_apart_from_floats() -> None:
    nodes = [("Conv", 1.0, "int8"), ("Conv", 2.0, "float32"), ("Add", 0.5, None), ("Conv", 0.5, "int8")]
    found = time_shares(nodes)
    assert [(time.kind, time.time_ms, time.quantized) for time in found] == [
        ("Conv", 2.0, False),
        ("Conv", 1.5, True),
        ("Add", 0.5, False),
    ]
    assert [time.share for time in found] == pytest.approx([0.5, 0.375, 0.125])


def test_the_bound_is_amdahls_and_none_where_it_does_not_apply() -> None:
    half = time_shares([("Conv", 3.0, "int8"), ("Add", 1.0, "float32")])
    assert speedup_bound(half) == pytest.approx(4.0)
    assert speedup_bound(time_shares([("Add", 1.0, "float32")])) is None
    assert speedup_bound(time_shares([("Conv", 1.0, "int8")])) is None
    assert time_shares([]) == []
    assert speedup_bound([]) is None
