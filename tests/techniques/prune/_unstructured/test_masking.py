"""Masks and masking: number and place of zeros, ties, existing zeros, and the report."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.techniques.prune._unstructured.masking import (
    Scope,
    SparsityTarget,
    globally_lowest,
    layer_mask,
    n_of_m_mask,
    row_mask,
    smallest,
    zero_lowest,
)
from omgoptim.techniques.prune._unstructured.parameter_selection import select
from omgoptim.techniques.registry import Outcome

SCOPES: list[Scope] = ["global", "per_layer", "per_row", "erdos_renyi"]


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
    masks = globally_lowest(scores, weights, 3)
    assert masks[0].tolist() == [[True, False], [True, False]]
    assert masks[1].tolist() == [False, False, True]


def test_zeros_that_are_there_come_first_whatever_their_scores() -> None:
    weights = [torch.tensor([0.0, 1.0, -0.0, 1.0])]
    assert globally_lowest([torch.tensor([9.0, 1.0, 9.0, 2.0])], weights, 3)[0].tolist() == [True, True, True, False]
    assert layer_mask(torch.tensor([9.0, 1.0, 9.0, 2.0]), weights[0], 2).tolist() == [True, False, True, False]


def test_the_last_weight_of_a_layer_goes_to_no_one_and_another_layer_gives_instead() -> None:
    weak, strong = torch.full((3,), 0.1), torch.full((5,), 10.0)
    masks = globally_lowest([weak, strong], [weak, strong], 4)
    assert [int(mask.sum()) for mask in masks] == [2, 2]
    masks = globally_lowest([weak, strong], [weak, strong], 8)
    assert [int(mask.sum()) for mask in masks] == [2, 4]  # six at most


def test_each_row_gives_the_same_and_the_first_rows_one_more() -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    assert row_mask(scores, torch.ones(3, 4), 7).sum(1).tolist() == [3, 2, 2]
    assert row_mask(scores, torch.ones(3, 4), 6).tolist() == [[True, True, False, False]] * 3
    assert row_mask(scores, torch.ones(3, 4), 12).sum(1).tolist() == [3, 3, 3]  # a row keeps its best


def test_a_row_with_zeros_of_its_own_keeps_them_and_the_others_give_less() -> None:
    weights = torch.ones(2, 4)
    weights[0, :3] = 0
    mask = row_mask(torch.arange(8.0).reshape(2, 4), weights, 4)
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
def test_n_of_every_m_neighbours_stay_and_they_are_the_best(n: int, m: int) -> None:
    scores = torch.rand(6, 4 * m, generator=torch.Generator().manual_seed(0))
    mask = n_of_m_mask(scores, torch.ones_like(scores), n, m)
    for row, gone in zip(scores, mask, strict=True):
        for start in range(0, len(row), m):
            group, lost = row[start : start + m], gone[start : start + m]
            assert int((~lost).sum()) == n
            assert group[~lost].min() > group[lost].max()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.Conv2d(16, 33, 3, groups=1), nn.ConvTranspose2d(33, 17, 2), nn.Linear(17, 101)
    )


def prune(module: nn.Module, sparsity: float, scope: Scope = "global", spare: bool = True) -> Outcome:
    selection = select(module, [], [])
    scores = {weight.path: weight.parameter.detach().abs() for weight in selection.weights}
    return zero_lowest(selection, scores, SparsityTarget(sparsity, scope, "by hand", spare))


def zeros(module: nn.Module) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in module)


def masks(module: nn.Module) -> torch.Tensor:
    return torch.cat([(layer.weight == 0).flatten() for layer in module])


TOTAL = 16 * 9 + 33 * 16 * 9 + 33 * 17 * 4 + 17 * 101


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.001, 0.1, 1 / 3, 0.5, 0.777, 0.9, 0.95])
def test_exactly_the_fraction_asked_for_is_zero(scope: Scope, sparsity: float) -> None:
    module = net()
    prune(module, sparsity, scope)
    assert zeros(module) == round(sparsity * TOTAL)


@pytest.mark.parametrize("scope", SCOPES)
def test_rising_sparsities_end_at_the_last_and_their_masks_are_nested(scope: Scope) -> None:
    module, before = net(), torch.zeros(TOTAL, dtype=torch.bool)
    for sparsity in (0.5, 0.75, 0.9):
        prune(module, sparsity, scope)
        assert zeros(module) == round(sparsity * TOTAL)
        assert bool((masks(module) | ~before).all())
        before = masks(module)
    straight = net()
    prune(straight, 0.9, scope)
    if scope == "global":
        assert torch.equal(masks(straight), before)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_weights_go_each_time_and_the_others_do_not_change(scope: Scope) -> None:
    first, second, whole = net(), net(), net()
    prune(first, 0.6, scope)
    prune(second, 0.6, scope)
    for a, b, c in zip(first, second, whole, strict=True):
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.weight, torch.where(a.weight == 0, 0.0, c.weight))
        assert torch.equal(a.bias, c.bias)


def test_a_layer_of_each_gives_its_fraction_and_a_row_of_each_too() -> None:
    module = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 20))
    prune(module, 0.5, "per_layer")
    assert [int((layer.weight == 0).sum()) for layer in module] == [40, 80]
    module = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 20))
    prune(module, 0.5, "per_row")
    assert (module[0].weight == 0).sum(1).tolist() == [5] * 8
    assert (module[1].weight == 0).sum(1).tolist() == [4] * 20


def test_a_row_of_a_transposed_convolution_is_an_output_channel() -> None:
    module = nn.Sequential(nn.ConvTranspose1d(4, 6, 5, groups=2))
    prune(module, 0.5, "per_row")
    counted = (module[0].weight == 0).reshape(2, 2, 3, 5).sum((1, 3)).flatten()  # (groups, in, out, kernel)
    assert counted.tolist() == [5] * 6


def test_nothing_is_left_of_the_pruning_but_the_zeros() -> None:
    module = net()
    names = list(module.state_dict())
    kinds = [type(value) for value in module.parameters()]
    module[1].weight.data[0, 0, 0, 0] = -0.0
    prune(module, 0.9)
    assert list(module.state_dict()) == names
    assert list(module.buffers()) == []
    assert [type(value) for value in module.parameters()] == kinds
    assert all(not layer._forward_pre_hooks for layer in module)
    for layer in module:
        assert not bool(torch.signbit(layer.weight[layer.weight == 0]).any())


def test_half_precision_and_other_memory_layouts_are_pruned_alike() -> None:
    plain, half, last = net(), net().to(torch.bfloat16), net().to(memory_format=torch.channels_last)
    half_again = net().to(torch.bfloat16).float()
    for module in (plain, half, last, half_again):
        prune(module, 0.8)
    assert torch.equal(masks(last), masks(plain))
    assert torch.equal(masks(half), masks(half_again))
    assert half[0].weight.dtype is torch.bfloat16


def test_a_shared_weight_counts_once_and_stays_shared() -> None:
    module = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10), nn.Linear(10, 5))
    module[2].weight = module[0].weight
    outcome = prune(module, 0.5, "per_layer")
    assert module[2].weight is module[0].weight
    assert int((module[0].weight == 0).sum()) + int((module[3].weight == 0).sum()) == 75
    assert [(change.path, change.what) for change in outcome.changed] == [
        ("0", "by hand, shared with 2"),
        ("3", "by hand"),
    ]


def test_the_outcome_tells_each_layer_and_what_all_make_together() -> None:
    module = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 100))
    module[0].weight.data.fill_(100.0)
    module[1].weight.data.fill_(0.5)
    module[1].weight.data[0, :5] = 0
    outcome = prune(module, 0.3)
    assert [(change.path, change.what, change.before, change.after) for change in outcome.changed] == [
        ("1", "by hand", "0.5 % zero", "33.0 % zero (330 of 1,000)")
    ]
    assert [(skip.path, skip.reason) for skip in outcome.skipped] == [
        ("0", "the saliency of all its weights is above the pruning threshold")
    ]
    assert outcome.notes == ["30.00 % of the selected weights are zero (330 of 1,100)."]


def test_small_layers_stay_dense_and_are_reported_and_the_count_is_exact() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 400, 3), nn.Linear(400, 10))
    count = 36 + 14_400 + 4_000
    outcome = prune(module, 0.9, "per_layer")
    assert zeros(module) == round(0.9 * count)
    assert not bool((module[0].weight == 0).any())
    assert [(skip.path, skip.reason) for skip in outcome.skipped] == [
        ("0", "left dense: it has only 0.20 % of the selected weights; other layers are pruned more instead")
    ]
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 400, 3), nn.Linear(400, 10))
    prune(module, 0.9, "per_layer", spare=False)
    assert int((module[0].weight == 0).sum()) == 32
    assert zeros(module) == round(0.9 * count)


def test_a_layer_keeps_its_best_weight_and_the_report_says_so() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 16))
    module[0].weight.data.copy_(torch.arange(1.0, 17).reshape(4, 4) / 1000)
    module[1].weight.data.fill_(1.0)
    outcome = prune(module, 0.5)
    assert zeros(module) == 40
    assert module[0].weight.flatten().nonzero().flatten().tolist() == [15]
    assert outcome.changed[0].what == "by hand, one weight kept, so that the layer's output still depends on its input"


def test_more_than_leaves_one_weight_to_each_layer_is_not_taken_and_the_outcome_tells_what_was() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    outcome = prune(module, 0.99)
    assert zeros(module) == 6
    assert outcome.notes == ["75.00 % of the selected weights are zero (6 of 8)."]


def test_asking_for_what_is_there_already_or_for_less_than_one_weight_is_refused() -> None:
    module = net()
    prune(module, 0.9)
    before = masks(module)
    for sparsity in (0.9, 0.5):
        with pytest.raises(TechniqueError, match="no weight became zero") as error:
            prune(module, sparsity)
        assert "are zero already" in error.value.why
        assert torch.equal(masks(module), before)
    with pytest.raises(TechniqueError, match="no weight became zero") as error:
        prune(nn.Sequential(nn.Linear(2, 2)), 0.01)
    assert "less than one" in error.value.why
