from __future__ import annotations

import itertools

import numpy as np
import pytest

from omgoptim.techniques.prune._latency import knapsack as knapsack
from omgoptim.techniques.prune._latency.knapsack import multiple_choice


def best_of_all(times: list[list[float]], losses: list[list[float]], budget: float) -> float | None:
    """Oracle: every combination."""
    totals = [
        sum(losses[g][option] for g, option in enumerate(choice))
        for choice in itertools.product(*(range(len(some)) for some in times))
        if sum(times[g][option] for g, option in enumerate(choice)) <= budget
    ]
    return min(totals, default=None)


def drawn(seed: int, groups: int = 5, options: int = 4) -> tuple[list[list[float]], list[list[float]]]:
    random = np.random.default_rng(seed)
    return random.uniform(-1, 2, (groups, options)).tolist(), random.uniform(0, 1, (groups, options)).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_is_the_least_of_all_combinations(seed: int) -> None:
    times, losses = drawn(seed)
    for budget in (-1.0, 0.5, 2.0, 5.0):
        choice = multiple_choice(times, losses, budget)
        expected = best_of_all(times, losses, budget)
        if choice is None:
            assert expected is None
        else:
            assert sum(times[g][option] for g, option in enumerate(choice)) <= budget + 1e-6
            assert sum(losses[g][option] for g, option in enumerate(choice)) == pytest.approx(expected)


def test_by_hand() -> None:
    times, losses = [[1.0, 3.0], [2.0, 4.0]], [[5.0, 0.0], [2.0, 0.0]]
    assert multiple_choice(times, losses, 3.0) == (0, 0)
    assert multiple_choice(times, losses, 5.0) == (1, 0)
    assert multiple_choice(times, losses, 7.0) == (1, 1)
    assert multiple_choice(times, losses, 2.9) is None


def test_with_no_groups_the_empty_choice_fits() -> None:
    assert multiple_choice([], [], 0.0) == ()


def test_thinned_states_still_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MOST_STATES", 20)
    times, losses = drawn(3, groups=7)
    choice = multiple_choice(times, losses, 4.0)
    expected = best_of_all(times, losses, 4.0)
    assert choice is not None
    assert expected is not None
    assert sum(times[g][option] for g, option in enumerate(choice)) <= 4.0 + 1e-6
    assert sum(losses[g][option] for g, option in enumerate(choice)) <= expected + 0.3
