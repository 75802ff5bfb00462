"""Spreads of entries of far different scales; the oracle is the spread that the entries were drawn with."""

from __future__ import annotations

import numpy as np
import pytest

from omgoptim.models.outputs import EntryScales


def scales_of(spreads: list[float], *shape: int, axis: int) -> EntryScales | None:
    """Draw 500 samples of a shape whose slices along `axis` have these spreads, and return their scales."""
    along = [-1 if place == axis else 1 for place in range(len(shape))]
    drawn = np.random.default_rng(0).normal(0, 1, (500, *shape)) * np.reshape(spreads, along) + 7
    rows = drawn.reshape(500, -1)
    return EntryScales.of(("batch", *shape), 0, ((rows - rows.mean(0)) ** 2).sum(0), 500)


def test_entries_of_one_scale_share_the_spread_of_all_of_them() -> None:
    found = scales_of([100.0, 150.0, 0.1, 0.2], 4, 6, axis=0)
    assert found is not None
    assert found.axis == 1
    large, small = np.sqrt((100**2 + 150**2) / 2), np.sqrt((0.1**2 + 0.2**2) / 2)
    assert found.values == pytest.approx([large, large, small, small], rel=0.05)


def test_three_scales_are_told_apart_along_the_last_dimension() -> None:
    found = scales_of([500.0, 1.0, 1.0, 0.01], 6, 4, axis=1)
    assert found is not None
    assert found.axis == 2
    assert found.values == pytest.approx([500.0, 1.0, 1.0, 0.01], rel=0.05)


def test_a_constant_entry_takes_the_largest_spread() -> None:
    found = scales_of([100.0, 0.0, 0.1], 3, axis=0)
    assert found is not None
    assert found.values == pytest.approx([100.0, 100.0, 0.1], rel=0.1)


@pytest.mark.parametrize("spreads", [[1.0, 2.0, 4.0, 5.0], [1.0, 1.0, 1.0, 0.11], [0.0, 0.0, 0.0, 0.0]])
def test_entries_of_like_scales_have_none(spreads: list[float]) -> None:
    assert scales_of(spreads, 4, axis=0) is None


def test_rows_and_columns_of_a_map_are_no_quantities() -> None:
    assert scales_of([100.0, 0.1], 3, 2, 8, axis=1) is None
    assert scales_of([100.0, 0.1], 2, 3, 8, axis=0) is not None
