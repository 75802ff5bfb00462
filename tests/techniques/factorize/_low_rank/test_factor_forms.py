from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from omgoptim.blocks import SpatialConv2d, Tucker2Conv2d
from omgoptim.techniques.factorize._low_rank.factor_forms import option_at, rank_options, solve
from omgoptim.techniques.factorize._low_rank.problem import Form, Problem, RankOption


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(*shape: int, data: bool = True, influence: bool = False) -> Problem:
    """Build a problem of a weight (groups, out, in, kh, kw), with inputs of uneven sizes."""
    groups, out, inside, height, width = shape
    n = inside * height * width
    rows = drawn(groups, 4 * n, n, seed=1) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    seen = rows.mT @ rows / (4 * n)
    back = drawn(groups, 20, out, seed=2)
    return Problem(drawn(*shape), seen if data else None, influence=back.mT @ back if influence else None)


def dense(form: Form, option: RankOption, of: Problem) -> Tensor:
    """Return the weight that solved factors represent, by the block itself, in the problem's shape."""
    groups, out, inside, height, width = of.weight.shape
    kind = Tucker2Conv2d if form == "tucker2" else SpatialConv2d
    block = kind(groups * inside, groups * out, (height, width), *option.ranks, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        for part, factor in zip(block.children(), solve(of, option), strict=True):
            part.weight.copy_(factor)
    return block.dense_weight().detach().reshape(of.weight.shape)


CASES: list[tuple[Form, tuple[int, ...]]] = [
    ("linear", (1, 5, 7, 1, 1)),
    ("linear", (2, 3, 4, 1, 1)),
    ("spatial", (1, 6, 4, 3, 2)),
    ("spatial", (2, 3, 2, 3, 3)),
    ("tucker2", (1, 6, 4, 3, 3)),
    ("tucker2", (2, 3, 5, 1, 2)),
    ("tucker2", (1, 2, 9, 2, 2)),
]


@pytest.mark.parametrize(("form", "shape"), CASES)
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("influence", [False, True])
def test_full_rank_gives_the_weight_back(form: Form, shape: tuple[int, ...], data: bool, influence: bool) -> None:
    of = problem(*shape, data=data, influence=influence)
    full = rank_options(of, form)[-1]
    assert full.error == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(dense(form, full, of), of.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_parameters_are_those_of_the_factors(form: Form, shape: tuple[int, ...]) -> None:
    of = problem(*shape)
    for option in rank_options(of, form):
        assert sum(factor.numel() for factor in solve(of, option)) == option.params


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("influence", [False, True])
def test_the_error_of_a_linear_option_is_what_its_product_really_costs(data: bool, influence: bool) -> None:
    of = problem(2, 5, 7, 1, 1, data=data, influence=influence)
    for option in rank_options(of, "linear")[:-1]:
        assert of.error(of.weight - dense("linear", option, of)) == pytest.approx(option.error, rel=1e-3)


def test_the_error_of_a_spatial_option_without_data_is_what_its_product_really_costs() -> None:
    of = problem(1, 6, 4, 3, 2, data=False)
    for option in rank_options(of, "spatial")[:-1]:
        assert of.error(of.weight - dense("spatial", option, of)) == pytest.approx(option.error, rel=1e-3)


@pytest.mark.parametrize("form", ["spatial", "tucker2"])
def test_knowing_the_inputs_never_costs_more_on_them(form: Form) -> None:
    of = problem(1, 8, 6, 3, 3)
    blind = Problem(of.weight)
    for option in rank_options(of, form)[:-1:4]:
        with_data = of.error(of.weight - dense(form, option, of))
        assert with_data <= of.error(of.weight - dense(form, option, blind)) + 1e-6 * of.energy


def test_tucker_is_no_worse_than_the_higher_order_svd() -> None:
    """Both sides cut independently, in torch; the sweeps may only improve on it."""
    of = problem(1, 8, 6, 3, 3, data=False)
    weight = of.weight[0]
    u_out = torch.linalg.svd(weight.flatten(1)).U[:, :4]
    u_in = torch.linalg.svd(weight.transpose(0, 1).flatten(1)).U[:, :3]
    kept = torch.einsum("oiyx,op,ij->pjyx", weight, u_out @ u_out.mT, u_in @ u_in.mT)
    option = option_at(of, "tucker2", 3)
    assert option.ranks == (3, 3)
    mine = RankOption("tucker2", (3, 4), 0, 0.0)
    assert of.error(of.weight - dense("tucker2", mine, of)) <= float((weight - kept).square().sum()) * (1 + 1e-9)


def test_options_grow_in_size_and_shrink_in_error() -> None:
    for form, shape in CASES:
        options = rank_options(problem(*shape), form)
        assert [option.params for option in options] == sorted({option.params for option in options})
        assert all(a.error >= b.error - 1e-12 for a, b in itertools.pairwise(options))


def test_ranks_are_multiples_of_what_was_asked() -> None:
    assert [option.ranks for option in rank_options(problem(1, 10, 12, 1, 1), "linear", 4)] == [(4,), (8,), (10,)]
    for option in rank_options(problem(1, 8, 8, 3, 3), "tucker2", 4):
        assert all(rank % 4 == 0 for rank in option.ranks)


def test_a_fixed_rank_is_cut_to_what_a_layer_has() -> None:
    of = problem(1, 6, 4, 3, 3)
    assert option_at(of, "spatial", 3).ranks == (3,)
    assert option_at(of, "spatial", 99).ranks == (12,)
    assert option_at(of, "tucker2", 5).ranks == (4, 5)
