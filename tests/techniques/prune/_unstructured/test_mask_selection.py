"""Masks from scores: their exact counts, ties, zeros that were there, and what is kept of a layer."""

from __future__ import annotations

import pytest
import torch

from omgoptim.techniques.prune._unstructured.masking import alone, by_row, keep_of_every, smallest, together


def test_exactly_so_many_of_the_smallest_are_chosen_and_of_equals_the_first() -> None:
    scores = torch.tensor([2.0, 1.0, 2.0, 2.0, 0.5])
    for count, mask in enumerate(([0] * 5, [0, 0, 0, 0, 1], [0, 1, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 0, 1])):
        assert smallest(scores, count).int().tolist() == mask


def test_the_choice_is_that_of_a_stable_sort() -> None:
    scores = torch.randint(0, 20, (500,), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 17, 250, 499, 500):
        expected = torch.zeros(500, dtype=torch.bool)
        expected[scores.argsort(stable=True)[:count]] = True
        assert torch.equal(smallest(scores, count), expected)


def test_layers_ranked_together_are_pruned_by_their_scores() -> None:
    weights = [torch.ones(2, 2), torch.ones(3)]
    scores = [torch.tensor([[1.0, 9.0], [2.0, 8.0]]), torch.tensor([3.0, 7.0, 0.5])]
    masks = together(scores, weights, 3)
    assert masks[0].tolist() == [[True, False], [True, False]]
    assert masks[1].tolist() == [False, False, True]


def test_zeros_that_are_there_come_first_whatever_their_scores() -> None:
    weights = [torch.tensor([0.0, 1.0, -0.0, 1.0])]
    assert together([torch.tensor([9.0, 1.0, 9.0, 2.0])], weights, 3)[0].tolist() == [True, True, True, False]
    assert alone(torch.tensor([9.0, 1.0, 9.0, 2.0]), weights[0], 2).tolist() == [True, False, True, False]


def test_the_last_weight_of_a_layer_goes_to_no_one_and_another_layer_gives_instead() -> None:
    weak, strong = torch.full((3,), 0.1), torch.full((5,), 10.0)
    masks = together([weak, strong], [weak, strong], 4)
    assert [int(mask.sum()) for mask in masks] == [2, 2]
    masks = together([weak, strong], [weak, strong], 8)
    assert [int(mask.sum()) for mask in masks] == [2, 4]  # six at most


def test_each_row_gives_the_same_and_the_first_rows_one_more() -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    assert by_row(scores, torch.ones(3, 4), 7).sum(1).tolist() == [3, 2, 2]
    assert by_row(scores, torch.ones(3, 4), 6).tolist() == [[True, True, False, False]] * 3
    assert by_row(scores, torch.ones(3, 4), 12).sum(1).tolist() == [3, 3, 3]  # a row keeps its best


def test_a_row_with_zeros_of_its_own_keeps_them_and_the_others_give_less() -> None:
    weights = torch.ones(2, 4)
    weights[0, :3] = 0
    mask = by_row(torch.arange(8.0).reshape(2, 4), weights, 4)
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
def test_n_of_every_m_neighbours_stay_and_they_are_the_best(n: int, m: int) -> None:
    scores = torch.rand(6, 4 * m, generator=torch.Generator().manual_seed(0))
    mask = keep_of_every(scores, torch.ones_like(scores), n, m)
    for row, gone in zip(scores, mask, strict=True):
        for start in range(0, len(row), m):
            group, lost = row[start : start + m], gone[start : start + m]
            assert int((~lost).sum()) == n
            assert group[~lost].min() > group[lost].max()
