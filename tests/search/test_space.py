"""A search space: its configurations, their encoding, their neighbours, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from omgoptim.architecture_search.space import ENUMERATED, Knob, Space
from omgoptim.errors import RequestError

SPACE = Space((Knob("width", (16, 32, 64)), Knob("kernel", (3, 5))))


def test_every_configuration_is_listed_once_and_comes_back_from_its_row() -> None:
    found = [SPACE.configuration(row) for row in SPACE.all_rows]
    assert len({tuple(each.items()) for each in found}) == SPACE.size == 6
    assert all((SPACE.row(each) == row).all() for each, row in zip(found, SPACE.all_rows, strict=True))


def test_one_hots_have_a_column_for_every_option_but_the_first() -> None:
    assert SPACE.one_hot(np.array([[0, 0], [1, 1], [2, 0]])).tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_singles_have_every_option_once_beside_the_first_ones() -> None:
    assert SPACE.single_changes.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1]]


def test_mutants_differ_in_one_knob_or_by_an_exchange_of_two() -> None:
    mutants = {tuple(row) for row in SPACE.mutants(np.array([1, 0])).tolist()}
    assert mutants == {(0, 0), (2, 0), (1, 1), (0, 1)}


def test_a_large_space_is_sampled_with_every_option_and_no_configuration_twice() -> None:
    large = Space(tuple(Knob(str(number), (0, 1, 2, 3)) for number in range(12)))
    assert large.size > ENUMERATED
    drawn = large.sample(500, np.random.default_rng(0))
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 500
    assert all(set(column) == {0, 1, 2, 3} for column in drawn.T.tolist())


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ((), "no choices"),
        ((Knob("a", ()),), "no options"),
        ((Knob("a", (1, 1)),), "twice"),
        ((Knob("a", (1,)), Knob("a", (2,))), "share a name"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(knobs: tuple[Knob, ...], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Space(knobs)


@pytest.mark.parametrize("wrong", [{"width": 16}, {"width": 17, "kernel": 3}, {"width": 16, "kernel": 3, "depth": 1}])
def test_a_configuration_outside_the_space_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        SPACE.row(wrong)


def test_true_and_one_are_different_options() -> None:
    assert Space((Knob("a", (1, True)),)).row({"a": True}).tolist() == [1]
