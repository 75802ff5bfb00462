from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from omgoptim.techniques.prune._latency.latency_table import smooth, step_edges, tile_size_of


def stairs(widths: range | tuple[int, ...], block: int) -> dict[int, float]:
    return {width: 0.01 + 0.02 * math.ceil(width / block) for width in widths}


def test_the_edges_are_the_widths_just_before_a_rise() -> None:
    assert step_edges(stairs(range(4, 41, 4), 16), range(4, 41, 4)) == (16, 32, 40)


def test_the_full_width_is_an_edge_even_within_a_step() -> None:
    assert step_edges({8: 1.0, 16: 1.0, 24: 1.0}, (8, 16, 24)) == (24,)


def test_a_width_that_is_slower_than_a_wider_one_is_no_edge() -> None:
    assert step_edges({8: 0.5, 12: 2.0, 16: 1.0, 24: 3.0}, (8, 12, 16, 24)) == (8, 16, 24)


def test_a_rise_within_the_tolerance_is_no_step() -> None:
    times = {8: 1.0, 16: 1.05, 24: 2.0}
    assert step_edges(times, (8, 16, 24), tolerance=0.1) == (16, 24)
    assert step_edges(times, (8, 16, 24), tolerance=0.01) == (8, 16, 24)


def test_every_candidate_is_dominated_by_an_edge_that_is_no_slower() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        times = {width: float(time) for width, time in zip(range(1, 13), random.uniform(1, 2, 12), strict=True)}
        edges = step_edges(times, list(times), tolerance=0.0)
        for width, time in times.items():
            assert any(edge >= width and times[edge] <= time for edge in edges)
        assert [times[edge] for edge in edges] == sorted(times[edge] for edge in edges)


def test_smoothing_a_row_is_isotonic_regression_of_the_logarithms() -> None:
    """Oracle: scikit-learn's IsotonicRegression."""
    row = np.random.default_rng(1).uniform(1, 1.2, 12)
    expected = np.exp(IsotonicRegression().fit_transform(np.arange(12), np.log(row)))
    assert smooth([row.tolist()], tolerance=0.5)[0] == pytest.approx(expected.tolist())


def test_smoothed_times_fall_along_neither_side() -> None:
    table = np.exp(np.random.default_rng(2).normal(0, 0.05, (6, 7))) * np.outer(np.arange(1, 7), np.arange(1, 8))
    smoothed = np.array(smooth(table.tolist(), tolerance=1.0))
    assert (np.diff(smoothed, axis=0) >= -1e-12).all()
    assert (np.diff(smoothed, axis=1) >= -1e-12).all()


def test_a_fall_beyond_the_tolerance_is_how_the_engine_is_and_stays() -> None:
    assert smooth([[1.0, 3.0, 2.0, 4.0]], tolerance=0.1) == (pytest.approx((1.0, 3.0, 2.0, 4.0)),)


def test_times_in_order_are_left_as_they_are() -> None:
    table = [[1.0, 2.0], [1.5, 3.0]]
    assert [list(row) for row in smooth(table, tolerance=0.2)] == [pytest.approx(row) for row in table]


@pytest.mark.parametrize("block", [8, 16, 32])
def test_the_block_of_a_kernel_is_found_in_its_stairs(block: int) -> None:
    widths = (33, 36, 40, 44, 48, 52, 56, 60, 64, 72, 80, 96)
    noise = np.random.default_rng(block).normal(1, 0.01, len(widths))
    times = {width: time * n for (width, time), n in zip(stairs(widths, block).items(), noise, strict=True)}
    assert tile_size_of(times) == block


@pytest.mark.parametrize("rise", [0.0, 0.01])
def test_without_stairs_the_block_is_eight(rise: float) -> None:
    assert tile_size_of({width: 1 + rise * width for width in (33, 36, 40, 44, 48, 52, 56, 60, 64, 72, 80, 96)}) == 8
