"""Ridge solutions against torch's own solvers."""

from __future__ import annotations

import pytest
import torch

from omgoptim.techniques.reconstruction.least_squares import masked_ridge, ridge


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
