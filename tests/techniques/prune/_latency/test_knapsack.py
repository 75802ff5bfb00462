"""Choice of widths within a latency budget against exhaustive search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from omgoptim.errors import TechniqueError
from omgoptim.techniques.prune._latency import knapsack as knapsack
from omgoptim.techniques.prune._latency.knapsack import choose_widths, fastest_widths, kept_share, multiple_choice
from omgoptim.techniques.prune._latency.latency_table import LayerTimes, Side, TimeTable, full_ms, predicted_ms

WIDTHS = (4, 8, 12, 16)


def best_of_options(times: list[list[float]], losses: list[list[float]], budget: float) -> float | None:
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
        expected = best_of_options(times, losses, budget)
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
    monkeypatch.setattr(knapsack, "MAX_STATES", 20)
    times, losses = drawn(3, groups=7)
    choice = multiple_choice(times, losses, 4.0)
    expected = best_of_options(times, losses, 4.0)
    assert choice is not None
    assert expected is not None
    assert sum(times[g][option] for g, option in enumerate(choice)) <= 4.0 + 1e-6
    assert sum(losses[g][option] for g, option in enumerate(choice)) <= expected + 0.3


def one_sided(name: str, times: tuple[float, ...]) -> LayerTimes:
    return LayerTimes(name, Side(3), Side(0, ((name, 1),)), (3,), WIDTHS, (times,))


def separable(seed: int, groups: int = 4) -> TimeTable:
    """Layers that each depend on one group."""
    random = np.random.default_rng(seed)
    names = [f"g{g}" for g in range(groups)]
    layers = [one_sided(name, tuple(np.cumsum(random.uniform(0.1, 1, 4)).tolist())) for name in names]
    return TimeTable("torch_eager", dict.fromkeys(names, 16), dict.fromkeys(names, WIDTHS), tuple(layers))


def chained(seed: int, groups: int = 4) -> TimeTable:
    """A layer between every two neighbouring groups, its time about the product of both widths."""
    random = np.random.default_rng(seed)
    names = [f"g{g}" for g in range(groups)]
    layers = [one_sided(names[0], (0.2, 0.3, 0.5, 0.6))]
    for before, after in itertools.pairwise(names):
        cost = random.uniform(0.3, 3) * random.uniform(0.9, 1.1, (4, 4)) * np.outer(WIDTHS, WIDTHS) / 256
        rows = np.maximum.accumulate(np.maximum.accumulate(cost, 0), 1)
        sides = Side(0, ((before, 1),)), Side(0, ((after, 1),))
        layers.append(LayerTimes(after, *sides, WIDTHS, WIDTHS, tuple(map(tuple, rows.tolist()))))
    return TimeTable("torch_eager", dict.fromkeys(names, 16), dict.fromkeys(names, WIDTHS), tuple(layers))


def scores(table: TimeTable, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(16, generator=generator) ** 2 for name in table.widths}


def lost(table: TimeTable, importance: dict[str, Tensor], widths: dict[str, int]) -> float:
    return sum(math.log(kept_share(importance[name], widths[name], 16)) ** 2 for name in table.widths)


def best_of_all(table: TimeTable, importance: dict[str, Tensor], wanted: float) -> float:
    """Oracle: every combination of widths."""
    combinations = (
        dict(zip(table.widths, widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=len(table.widths))
    )
    budget = wanted * full_ms(table)
    return min(lost(table, importance, widths) for widths in combinations if predicted_ms(table, widths) <= budget)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("wanted", [0.45, 0.6, 0.8])
def test_where_times_add_up_the_widths_are_the_best_of_all_combinations(seed: int, wanted: float) -> None:
    table = separable(seed)
    importance = scores(table, seed)
    widths = choose_widths(table, importance, wanted)
    assert predicted_ms(table, widths) <= wanted * full_ms(table)
    assert lost(table, importance, widths) == pytest.approx(best_of_all(table, importance, wanted))


@pytest.mark.parametrize("wanted", [0.25, 0.5, 0.75])
def test_where_layers_depend_on_two_groups_little_is_lost_to_the_best_of_all(wanted: float) -> None:
    gaps = []
    for seed in range(8):
        table = chained(seed)
        importance = scores(table, seed)
        widths = choose_widths(table, importance, wanted)
        assert predicted_ms(table, widths) <= wanted * full_ms(table)
        gaps.append(lost(table, importance, widths) - best_of_all(table, importance, wanted))
    assert max(gaps) < 0.05
    assert sum(gap < 1e-9 for gap in gaps) >= 6


def test_with_all_of_the_time_nothing_is_removed() -> None:
    table = chained(0)
    assert choose_widths(table, scores(table, 0), 1.0) == table.widths


def test_channels_that_are_free_within_a_step_are_kept() -> None:
    table = TimeTable("torch_eager", {"a": 16}, {"a": WIDTHS}, (one_sided("a", (1.0, 1.0, 1.0, 4.0)),))
    assert choose_widths(table, {"a": torch.ones(16)}, 0.9) == {"a": 12}


def test_of_equal_groups_the_slower_one_gives_more() -> None:
    layers = (one_sided("slow", (2.0, 4.0, 6.0, 8.0)), one_sided("quick", (0.1, 0.2, 0.3, 0.4)))
    table = TimeTable("torch_eager", {"slow": 16, "quick": 16}, {"slow": WIDTHS, "quick": WIDTHS}, layers)
    widths = choose_widths(table, {"slow": torch.ones(16), "quick": torch.ones(16)}, 0.6)
    assert widths == {"slow": 8, "quick": 16}


def test_equal_groups_that_cost_the_same_shrink_alike() -> None:
    layers = tuple(one_sided(name, (1.0, 2.0, 3.0, 4.0)) for name in "abc")
    table = TimeTable("torch_eager", dict.fromkeys("abc", 16), dict.fromkeys("abc", WIDTHS), layers)
    assert choose_widths(table, {name: torch.ones(16) for name in "abc"}, 0.5) == {"a": 8, "b": 8, "c": 8}


def test_groups_compare_by_shares_whatever_the_scale_of_their_scores() -> None:
    table = separable(1)
    importance = scores(table, 1)
    scaled = {name: score * 1000**index for index, (name, score) in enumerate(importance.items())}
    assert choose_widths(table, importance, 0.6) == choose_widths(table, scaled, 0.6)


def test_no_group_loses_more_than_the_ratio() -> None:
    table = chained(2)
    widths = choose_widths(table, scores(table, 2), 0.4, max_layer_ratio=0.5)
    assert min(widths.values()) >= 8


def test_a_group_without_importance_stays_whole() -> None:
    table = separable(3)
    importance = scores(table, 3)
    del importance["g1"]
    widths = choose_widths(table, importance, 0.7)
    assert widths["g1"] == 16
    assert predicted_ms(table, widths) <= 0.7 * full_ms(table)


def test_a_group_that_no_measured_layer_reads_or_writes_stays_whole() -> None:
    table = TimeTable(
        "torch_eager", {"a": 16, "b": 16}, {"a": WIDTHS, "b": WIDTHS}, (one_sided("a", (1.0, 2.0, 3.0, 4.0)),)
    )
    assert choose_widths(table, {"a": torch.ones(16), "b": torch.ones(16)}, 0.5) == {"a": 8, "b": 16}


def test_an_unreachable_target_is_refused_with_the_best_possible_speed() -> None:
    table = TimeTable("torch_eager", {"a": 16}, {"a": WIDTHS}, (one_sided("a", (2.0, 3.0, 4.0, 5.0)),))
    with pytest.raises(TechniqueError) as error:
        choose_widths(table, {"a": torch.ones(16)}, 0.3)
    assert "2.50x" in error.value.why
    assert "max_layer_ratio" in error.value.fix


def test_the_fastest_widths_are_the_last_that_can_be_wanted() -> None:
    table = chained(4)
    importance = scores(table, 4)
    fastest = fastest_widths(table, importance, 0.75)
    least = predicted_ms(table, fastest) / full_ms(table)
    assert least == pytest.approx(
        min(
            predicted_ms(table, dict(zip(table.widths, widths, strict=True)))
            for widths in itertools.product(WIDTHS, repeat=4)
        )
        / full_ms(table)
    )
    assert predicted_ms(table, choose_widths(table, importance, least * 1.0001, 0.75)) <= least * 1.0001 * full_ms(
        table
    )
    with pytest.raises(TechniqueError):
        choose_widths(table, importance, least * 0.999, 0.75)


def test_the_share_kept_is_that_of_the_most_important_channels() -> None:
    assert kept_share(torch.tensor([1.0, 4.0, 3.0, 2.0]), 2, 4) == pytest.approx(0.7)
    assert kept_share(torch.tensor([3.0, 1.0]), 4, 8) == pytest.approx(0.75)  # a score for every four channels
    assert kept_share(torch.zeros(4), 1, 4) == pytest.approx(0.25)


def test_many_groups_are_chosen_for_within_the_budget() -> None:
    table = chained(5, groups=40)
    widths = choose_widths(table, scores(table, 5), 0.5)
    assert 0.47 <= predicted_ms(table, widths) / full_ms(table) <= 0.5


def test_the_same_table_gives_the_same_widths() -> None:
    table = chained(6, groups=8)
    assert choose_widths(table, scores(table, 6), 0.5) == choose_widths(table, scores(table, 6), 0.5)
