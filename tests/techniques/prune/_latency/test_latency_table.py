"""Latency table, steps of latency over width, and the search for a target."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from omgoptim.techniques.prune._latency.latency_table import (
    LayerTimes,
    MeasuredCut,
    Side,
    TimeTable,
    allowed_widths,
    full_ms,
    min_ms,
    next_target,
    predicted_ms,
    smooth,
    step_edges,
    tile_size_of,
)

A, B = Side(0, (("a", 1),)), Side(0, (("b", 1),))
TABLE = TimeTable(
    "torch_eager",
    widths={"a": 16, "b": 8},
    candidates={"a": (4, 8, 16), "b": (4, 8)},
    layers=(
        LayerTimes("one", Side(3), A, (3,), (4, 8, 16), ((1.0, 2.0, 4.0),)),
        LayerTimes("two", A, B, (4, 8, 16), (4, 8), ((0.5, 1.0), (1.0, 2.0), (2.0, 4.0))),
        LayerTimes("head", Side(0, (("b", 49),)), Side(10), (196, 392), (10,), ((0.5,), (1.0,))),
    ),
)


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


def test_the_prediction_adds_up_the_layers_at_their_sizes() -> None:
    assert full_ms(TABLE) == 4 + 4 + 1
    assert predicted_ms(TABLE, {"a": 8}) == 2 + 2 + 1
    assert predicted_ms(TABLE, {"a": 4, "b": 4}) == 1 + 0.5 + 0.5


def test_between_measured_sizes_the_wider_one_counts() -> None:
    assert predicted_ms(TABLE, {"a": 5}) == predicted_ms(TABLE, {"a": 8})
    assert predicted_ms(TABLE, {"a": 3}) == predicted_ms(TABLE, {"a": 4})


def test_a_channel_may_stand_for_several_features() -> None:
    side = Side(2, (("a", 3), ("b", 1)))
    assert side.size({"a": 10, "b": 5}) == 37


def test_a_layer_whose_output_decides_its_input_has_one_row() -> None:
    depthwise = LayerTimes("dw", Side(16), A, (16,), (4, 8, 16), ((1.0, 2.0, 3.0),))
    assert depthwise.at({"a": 8}) == 2.0
    assert depthwise.groups == ("a",)


def test_the_floor_is_every_group_at_its_narrowest_allowed_width() -> None:
    assert min_ms(TABLE, max_layer_ratio=0.75) == 2.0
    assert min_ms(TABLE, max_layer_ratio=0.5) == 2 + 1 + 0.5
    assert min_ms(TABLE, max_layer_ratio=0.1) == full_ms(TABLE)


@pytest.mark.parametrize(("ratio", "widths"), [(0.75, (4, 8, 16)), (0.5, (8, 16)), (0.74, (8, 16)), (0.01, (16,))])
def test_a_group_may_lose_at_most_the_ratio(ratio: float, widths: tuple[int, ...]) -> None:
    assert allowed_widths(TABLE, "a", ratio) == widths


def test_the_first_aim_is_the_target_with_a_margin() -> None:
    assert next_target([], 0.5) == pytest.approx(0.495)


def test_the_second_aim_is_where_the_line_through_the_uncut_model_meets_the_target() -> None:
    # measured = 0.4 + 0.6 * predicted: half of the time is at 0.1583, 0.495 of it
    assert next_target([MeasuredCut(0.5, 0.5, 0.7)], 0.5) == pytest.approx(
        0.25
    )  # no less than half of what was asked before
    assert next_target([MeasuredCut(0.3, 0.3, 0.58)], 0.5) == pytest.approx((0.495 - 0.4) / 0.6)


def test_an_aim_lies_between_a_cut_that_missed_and_one_that_held() -> None:
    history = [MeasuredCut(0.5, 0.5, 0.6), MeasuredCut(0.3, 0.3, 0.4)]
    assert next_target(history, 0.5) == pytest.approx(0.3 + 0.095)  # the line's own answer
    steep = [MeasuredCut(0.5, 0.5, 0.501), MeasuredCut(0.3, 0.3, 0.1)]
    assert 0.32 <= next_target(steep, 0.5) <= 0.48


def test_after_an_overshoot_more_is_kept() -> None:
    assert 0.2 < next_target([MeasuredCut(0.25, 0.2, 0.3)], 0.5) < 1


@pytest.mark.parametrize("measured", [1.0, 1.2])
def test_a_cut_that_brought_nothing_is_followed_by_a_deeper_one(measured: float) -> None:
    assert 0.01 <= next_target([MeasuredCut(0.5, 0.48, measured)], 0.5) < 0.48


@pytest.mark.parametrize(("fixed", "power"), [(0.0, 1.0), (0.3, 1.0), (0.2, 0.6), (0.1, 1.6)])
def test_aims_come_to_the_target_whatever_the_model_is_like(fixed: float, power: float) -> None:
    history: list[MeasuredCut] = []
    while len(history) < 8 and not (history and 0.45 <= history[-1].measured <= 0.5):
        wanted = next_target(history, 0.5)
        history.append(MeasuredCut(wanted, wanted, fixed + (1 - fixed) * wanted**power))
    assert 0.45 <= history[-1].measured <= 0.5
    assert len(history) <= 5


def test_an_aim_is_never_beyond_its_bounds() -> None:
    assert next_target([MeasuredCut(0.011, 0.011, 0.9)], 0.1) >= 0.01


def test_a_group_that_is_not_named_keeps_its_full_width() -> None:
    assert predicted_ms(replace(TABLE, layers=TABLE.layers[:1]), {}) == 4.0
