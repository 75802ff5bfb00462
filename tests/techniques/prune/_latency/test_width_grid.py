from __future__ import annotations

import torch

from omgoptim.techniques.prune._channels.groups import Group, Place
from omgoptim.techniques.prune._latency.latency_table import Side
from omgoptim.techniques.prune._latency.layer_timing import evenly_spread, side_of, sizes_of, widths_of


def group(width: int, unit: int = 1, name: str = "g") -> Group:
    return Group(name, width, unit, "channels", ())


def place(width: int, features: int = 1) -> Place:
    roots = torch.arange(width).repeat_interleave(features)
    return Place("layer", "in", torch.arange(width * features), roots)


def test_widths_are_multiples_and_the_full_one_is_the_last() -> None:
    assert widths_of(group(60), 20, round_to=8) == (8, 16, 24, 32, 40, 48, 56, 60)
    assert widths_of(group(60, unit=12), 20, round_to=8) == (24, 48, 60)


def test_no_width_is_below_a_tenth() -> None:
    assert widths_of(group(100), 100, round_to=1)[0] == 10


def test_only_so_many_widths_evenly() -> None:
    assert widths_of(group(256), 5, round_to=16) == (32, 96, 144, 192, 256)


def test_a_group_too_narrow_for_the_rounding_goes_by_its_unit() -> None:
    assert widths_of(group(6), 8, round_to=8) == (1, 2, 3, 4, 5, 6)
    assert widths_of(group(6, unit=2), 8, round_to=8) == (2, 4, 6)


def test_a_group_of_one_unit_has_its_full_width_alone() -> None:
    assert widths_of(group(4, unit=4), 8) == (4,)


def test_spread_keeps_both_ends() -> None:
    assert evenly_spread(range(10), 4) == (0, 3, 6, 9)
    assert evenly_spread((1, 2), 4) == (1, 2)


def test_a_side_is_made_of_its_groups_and_what_is_fixed() -> None:
    a, b = group(16, name="a"), group(8, name="b")
    assert side_of(16, [(a, place(16))]) == Side(0, (("a", 1),))
    assert side_of(16 * 49, [(a, place(16, 49))]) == Side(0, (("a", 49),))
    assert side_of(30, [(a, place(16)), (b, place(8))]) == Side(6, (("a", 1), ("b", 1)))
    assert side_of(32, [(a, place(16)), (a, place(16))]) == Side(0, (("a", 2),))
    assert side_of(10, []) == Side(10)


def test_sizes_of_a_side_follow_all_of_its_groups() -> None:
    candidates, full = {"a": (4, 8, 16), "b": (8, 16)}, {"a": 16, "b": 16}
    assert sizes_of(Side(3), candidates, full, 8) == (3,)
    assert sizes_of(Side(0, (("a", 3),)), candidates, full, 8) == (12, 24, 48)
    assert sizes_of(Side(1, (("a", 1), ("b", 1))), candidates, full, 8) == (13, 17, 33)
    assert sizes_of(Side(0, (("a", 1),)), candidates, full, 2) == (4, 16)
