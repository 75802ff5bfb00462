"""Ridge and low-rank solutions against torch's own solvers and hand-computed errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omgoptim.techniques.reconstruction.least_squares import (
    cholesky,
    fit_to_features,
    fit_to_inputs,
    masked_ridge,
    ridge,
    singular_values,
    squared_error,
    truncate,
    truncate_by_outputs,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_without_damping_it_is_the_least_squares_solution_in_every_group() -> None:
    rows, targets = drawn(2, 50, 6), drawn(2, 50, 3, seed=1)
    oracle = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(ridge(rows.mT @ rows, rows.mT @ targets, 1e-12), oracle)


def test_a_prior_is_where_directions_that_no_row_shows_stay() -> None:
    rows = drawn(20, 4)
    rows[:, 2] = 0.0
    prior = drawn(4, 2, seed=1)
    solved = ridge(rows.T @ rows, rows.T @ drawn(20, 2, seed=2), 0.1, prior)
    torch.testing.assert_close(solved[2], prior[2])
    strength = 0.1 * (rows.T @ rows).diagonal().mean().sqrt() ** 2
    stacked = torch.cat([rows, strength.sqrt() * torch.eye(4).double()])
    oracle = torch.linalg.lstsq(stacked, torch.cat([drawn(20, 2, seed=2), strength.sqrt() * prior])).solution
    torch.testing.assert_close(solved, oracle)


def test_moments_that_are_not_finite_give_nan() -> None:
    gram = torch.full((1, 2, 2), torch.nan).double()
    assert bool(ridge(gram, torch.ones(1, 2, 1).double(), 0.1).isnan().all())


def test_each_output_is_the_ridge_regression_on_its_kept_inputs() -> None:
    rows, targets = drawn(2, 200, 6), drawn(2, 200, 3, seed=1)
    kept = (torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    solved = masked_ridge(rows.mT @ rows, rows.mT @ targets, kept, 1e-2, tolerance=1e-12)
    for group in range(2):
        gram = rows[group].T @ rows[group]
        strength = 1e-2 * gram.diagonal().mean()
        for output in range(3):
            chosen = kept[group, :, output].nonzero().flatten()
            left = gram[chosen][:, chosen] + strength * torch.eye(len(chosen)).double()
            exact = torch.linalg.solve(left, rows[group].T[chosen] @ targets[group][:, output])
            expected = torch.zeros(6).double()
            expected[chosen] = exact
            torch.testing.assert_close(solved[group, :, output], expected, atol=1e-9, rtol=0)


def test_an_output_without_kept_weights_and_silent_inputs_get_zeros() -> None:
    kept = torch.tensor([[0.0, 1.0]]).expand(4, 2)[None]
    solved = masked_ridge(torch.eye(4)[None], torch.ones(1, 4, 2), kept, 1e-2)
    assert not bool(solved[0, :, 0].any())
    assert solved[0, :, 1].tolist() == pytest.approx([1 / 1.01] * 4)
    assert not bool(masked_ridge(torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), kept, 1e-2).any())


def drawn_doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(features: int, seed: int = 1) -> Tensor:
    rows = drawn_doubles(100, features, seed=seed) * torch.logspace(0, -2, features, dtype=torch.float64)
    return rows.mT @ rows / 100


def test_a_diagonal_weight_keeps_its_largest_entries() -> None:
    """By hand: of diag(3, 2), rank 1 keeps the 3, shared as sqrt 3 times sqrt 3."""
    factors = truncate(torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)), 1)
    torch.testing.assert_close(factors.product, torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(factors.b[0, 0], torch.tensor(3.0, dtype=torch.float64).sqrt())


def test_inputs_that_are_large_count_more() -> None:
    """By hand: of diag(3, 2) with inputs of size 1 and 2, rank 1 keeps the 2: it gives 4, the other 3."""
    inputs = cholesky(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)), 0.0)
    kept = truncate(torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)), 1, inputs).product
    torch.testing.assert_close(kept, torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64))


def test_outputs_that_matter_more_count_more() -> None:
    """By hand: of diag(3, 2) with an influence of 1 and 4 (sizes 1 and 2), rank 1 keeps the 2."""
    influence = cholesky(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)), 0.0)
    kept = truncate(torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)), 1, None, influence).product
    torch.testing.assert_close(kept, torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("with_influence", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_the_sum_of_squares_of_the_cut_off_singular_values(
    with_inputs: bool, with_influence: bool, rank: int
) -> None:
    weight = drawn_doubles(5, 7)
    inputs = cholesky(moment(7), 1e-6) if with_inputs else None
    influence = cholesky(moment(5, seed=2), 1e-2) if with_influence else None
    change = weight - truncate(weight, rank, inputs, influence).product
    seen = inputs @ inputs.mT if inputs is not None else None
    expected = singular_values(weight, inputs, influence)[rank:].square().sum()
    assert squared_error(change, seen, influence) == pytest.approx(float(expected), rel=1e-8, abs=1e-12)


def test_no_other_product_of_that_rank_has_a_smaller_error() -> None:
    """Against the product found by alternating least squares in torch, from ten starts."""
    weight, seen = drawn_doubles(5, 7), moment(7)
    inputs = cholesky(seen, 0.0)
    best = squared_error(weight - truncate(weight, 2, inputs).product, seen)
    for start in range(10):
        a = drawn_doubles(2, 7, seed=start + 10)
        for _ in range(50):
            b = fit_to_features(weight, seen, a, damping=0.0)
            a = torch.linalg.lstsq(b, weight).solution
        assert squared_error(weight - b @ a, seen) >= best * (1 - 1e-9)


def test_full_rank_gives_the_weight_back() -> None:
    weight = drawn_doubles(5, 7)
    inputs, influence = cholesky(moment(7), 1e-6), cholesky(moment(5), 1.0)
    torch.testing.assert_close(truncate(weight, 5, inputs, influence).product, weight)


def test_both_factors_share_the_singular_values() -> None:
    factors = truncate(drawn_doubles(6, 9), 4)
    torch.testing.assert_close(factors.b.norm(dim=0), factors.a.norm(dim=1))


def test_the_moment_of_the_outputs_gives_the_same_product() -> None:
    weight, seen, influence = drawn_doubles(5, 7), moment(7), cholesky(moment(5, seed=2), 1.0)
    given = weight @ seen @ weight.mT
    by_outputs = truncate_by_outputs(weight, 3, given, influence)
    torch.testing.assert_close(by_outputs.product, truncate(weight, 3, cholesky(seen, 0.0), influence).product)


def test_a_singular_moment_still_has_a_factor() -> None:
    ones = torch.ones(3, 3, dtype=torch.float64)
    factor = cholesky(ones, 1e-6)
    torch.testing.assert_close(factor @ factor.mT, ones, rtol=0, atol=1e-5)
    torch.testing.assert_close(cholesky(torch.zeros_like(ones), 1e-6), torch.eye(3, dtype=torch.float64))


def test_a_refitted_weight_undoes_what_was_done_to_the_inputs() -> None:
    """The new inputs are twice the old ones: half the weight gives what the weight gave."""
    weight, seen = drawn_doubles(2, 3), moment(3)
    torch.testing.assert_close(fit_to_inputs(weight, 2 * seen, 4 * seen, 1e-12), weight / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit_to_inputs(weight, 2 * seen, 4 * seen, 1e12), weight)


def test_projecting_onto_all_features_changes_nothing() -> None:
    weight, features = drawn_doubles(2, 3), drawn_doubles(3, 3, seed=5)
    torch.testing.assert_close(fit_to_features(weight, moment(3), features, damping=0.0) @ features, weight)
