from __future__ import annotations

from dataclasses import replace

import pytest

from omgoptim.techniques.prune._latency.latency_table import (
    LayerTimes,
    MeasuredCut,
    Side,
    TimeTable,
    allowed,
    floor_ms,
    full_ms,
    next_aim,
    predicted_ms,
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
    assert floor_ms(TABLE, max_layer_ratio=0.75) == 2.0
    assert floor_ms(TABLE, max_layer_ratio=0.5) == 2 + 1 + 0.5
    assert floor_ms(TABLE, max_layer_ratio=0.1) == full_ms(TABLE)


@pytest.mark.parametrize(("ratio", "widths"), [(0.75, (4, 8, 16)), (0.5, (8, 16)), (0.74, (8, 16)), (0.01, (16,))])
def test_a_group_may_lose_at_most_the_ratio(ratio: float, widths: tuple[int, ...]) -> None:
    assert allowed(TABLE, "a", ratio) == widths


def test_the_first_aim_is_the_target_with_a_margin() -> None:
    assert next_aim([], 0.5) == pytest.approx(0.495)


def test_the_second_aim_is_where_the_line_through_the_uncut_model_meets_the_target() -> None:
    # measured = 0.4 + 0.6 * predicted: half of the time is at 0.1583, 0.495 of it
    assert next_aim([MeasuredCut(0.5, 0.5, 0.7)], 0.5) == pytest.approx(
        0.25
    )  # no less than half of what was asked before
    assert next_aim([MeasuredCut(0.3, 0.3, 0.58)], 0.5) == pytest.approx((0.495 - 0.4) / 0.6)


def test_an_aim_lies_between_a_cut_that_missed_and_one_that_held() -> None:
    history = [MeasuredCut(0.5, 0.5, 0.6), MeasuredCut(0.3, 0.3, 0.4)]
    assert next_aim(history, 0.5) == pytest.approx(0.3 + 0.095)  # the line's own answer
    steep = [MeasuredCut(0.5, 0.5, 0.501), MeasuredCut(0.3, 0.3, 0.1)]
    assert 0.32 <= next_aim(steep, 0.5) <= 0.48


def test_after_an_overshoot_more_is_kept() -> None:
    assert 0.2 < next_aim([MeasuredCut(0.25, 0.2, 0.3)], 0.5) < 1


@pytest.mark.parametrize("measured", [1.0, 1.2])
def test_a_cut_that_brought_nothing_is_followed_by_a_deeper_one(measured: float) -> None:
    assert 0.01 <= next_aim([MeasuredCut(0.5, 0.48, measured)], 0.5) < 0.48


@pytest.mark.parametrize(("fixed", "power"), [(0.0, 1.0), (0.3, 1.0), (0.2, 0.6), (0.1, 1.6)])
def test_aims_come_to_the_target_whatever_the_model_is_like(fixed: float, power: float) -> None:
    history: list[MeasuredCut] = []
    while len(history) < 8 and not (history and 0.45 <= history[-1].measured <= 0.5):
        wanted = next_aim(history, 0.5)
        history.append(MeasuredCut(wanted, wanted, fixed + (1 - fixed) * wanted**power))
    assert 0.45 <= history[-1].measured <= 0.5
    assert len(history) <= 5


def test_an_aim_is_never_beyond_its_bounds() -> None:
    assert next_aim([MeasuredCut(0.011, 0.011, 0.9)], 0.1) >= 0.01


def test_a_group_that_is_not_named_keeps_its_full_width() -> None:
    assert predicted_ms(replace(TABLE, layers=TABLE.layers[:1]), {}) == 4.0
