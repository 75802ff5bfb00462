from __future__ import annotations

import itertools

import pytest

from omgoptim.errors import TechniqueError
from omgoptim.techniques.factorize._low_rank.problem import RankOption
from omgoptim.techniques.factorize._low_rank.rank_allocation import (
    RankChoice,
    allocate_ranks,
    pareto,
    with_energy,
    within_params,
)


def options(per_rank: int, costs: list[float]) -> list[RankOption]:
    return [RankOption("linear", (r,), r * per_rank, sum(costs[r:])) for r in range(1, len(costs) + 1)]


def layered(params: int, per_rank: int, costs: list[float]) -> RankChoice:
    smaller = [option for option in options(per_rank, costs) if option.params < params]
    return RankChoice(params, tuple(smaller), tuple(option.error for option in smaller))


def test_one_layers_goals_by_hand() -> None:
    """Costs 8, 4, 2, 1, each rank 10 weights: errors 7, 3, 1, 0."""
    some = options(10, [8.0, 4.0, 2.0, 1.0])
    assert within_params(some, 25) == some[1]
    assert within_params(some, 9) is None
    assert with_energy(some, 0.8, 15.0) == some[1]
    assert with_energy(some, 1.0, 15.0) == some[3]


def test_only_options_that_nothing_beats_are_kept() -> None:
    good, larger, worse = (RankOption("linear", (1,), p, e) for p, e in ((10, 1.0), (12, 1.0), (10, 2.0)))
    assert pareto([larger, worse, good]) == [good]


def test_what_is_saved_comes_from_the_layer_that_loses_least() -> None:
    """By hand: 100 weights each, 20 a rank; halving both together leaves 100: ranks 4 and 1, or one dense."""
    flat, steep = layered(100, 20, [5.0, 5.0, 5.0, 5.0, 5.0]), layered(100, 20, [9.0, 0.1, 0.1, 0.1, 0.1])
    chosen = allocate_ranks({"flat": flat, "steep": steep}, 0, 200, 200 / 120)
    assert {path: option.ranks for path, option in chosen.items()} == {"steep": (1,)}


@pytest.mark.parametrize("compression", [1.2, 1.5, 2.0, 200 / 60])
def test_shared_ranks_lose_little_more_than_the_best_of_all_choices(compression: float) -> None:
    """Oracle: every combination of three layers, by brute force."""
    layers = {
        "a": layered(64, 4, [10 * 0.5**k for k in range(16)]),
        "b": layered(64, 4, [3.0 / (1 + k) for k in range(16)]),
        "c": layered(64, 4, [1.0] * 16),
    }
    chosen = allocate_ranks(layers, 8, 200, compression)
    budget = 200 / compression - 8
    best = min(
        sum(error for _, error in picked)
        for picked in itertools.product(
            *([(layer.params, 0.0), *((o.params, o.error) for o in layer.options)] for layer in layers.values())
        )
        if sum(params for params, _ in picked) <= budget
    )
    used = sum(chosen[path].params if path in chosen else 64 for path in layers)
    lost = sum(option.error for option in chosen.values())
    assert used <= budget
    assert lost <= best * 1.05 + 0.2


def test_a_target_out_of_reach_names_the_best_and_the_reason() -> None:
    with pytest.raises(TechniqueError, match=r"a compression of 4 cannot be reached: the maximum is 1\.82") as raised:
        allocate_ranks({"a": layered(100, 20, [1.0] * 5)}, 90, 200, 4.0)
    assert "90 of 200 parameters (45%)" in raised.value.why
    assert "need 20 at their smallest ranks" in raised.value.why


def test_ranks_too_coarse_for_a_target_are_an_error() -> None:
    """By hand: 100 weights at 45 a rank leave 45 or 90; a compression of 2 within 2 % needs 49 to 50."""
    with pytest.raises(TechniqueError, match="within 2%") as raised:
        allocate_ranks({"a": layered(100, 45, [1.0, 1.0])}, 0, 100, 2.0)
    assert "2.22" in raised.value.why
    assert "round_to 1" in raised.value.fix


def test_time_decides_the_order_where_times_are_given() -> None:
    """By hand: both lose the same for the same weights, but only `slow` takes long."""
    one = layered(100, 20, [1.0] * 5)
    slow = RankChoice(one.params, one.options, one.losses, (1.0, 2.0, 3.0, 4.0), 10.0)
    fast = RankChoice(one.params, one.options, one.losses, (0.1, 0.2, 0.3, 0.4), 0.5)
    chosen = allocate_ranks({"fast": fast, "slow": slow}, 0, 200, 200 / 180)
    assert list(chosen) == ["slow"]
