"""Sparsity by layer and by round: densities, whole numbers, small layers, schedules."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import pytest

from omgoptim.errors import RequestError
from omgoptim.techniques.prune._unstructured.sparsity_allocation import (
    erdos_renyi,
    largest_remainder,
    round_targets,
    small_layers,
)


def test_erdos_renyi_keeps_weights_in_proportion_to_a_layers_sides() -> None:
    # 10 x 10 keeps in proportion to 20, 10 x 30 to 40; together 400 weights of which 30 stay: 10 and 20
    assert erdos_renyi([(10, 10), (10, 30)], 1 - 30 / 400) == pytest.approx([0.9, 1 - 20 / 300])


def test_erdos_renyi_counts_a_kernels_sides_too() -> None:
    # 8 + 4 + 3 + 3 = 18 of 288 against 18 + 18 = 36 of 324: kept 1 to 2
    fractions = erdos_renyi([(8, 4, 3, 3), (18, 18)], 0.9)
    kept = [288 * (1 - fractions[0]), 324 * (1 - fractions[1])]
    assert kept[1] == pytest.approx(2 * kept[0])


def test_a_layer_that_would_keep_more_than_it_has_keeps_all_and_the_others_share_the_rest() -> None:
    shapes = [(4, 1, 3, 3), (64, 64, 3, 3), (10, 64)]
    fractions = erdos_renyi(shapes, 0.9)
    counts = [math.prod(shape) for shape in shapes]
    assert fractions[0] == 0.0
    assert sum(f * n for f, n in zip(fractions, counts, strict=True)) == pytest.approx(0.9 * sum(counts))
    assert all(0 <= fraction < 1 for fraction in fractions)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_erdos_renyi_holds_the_sparsity_of_all_together(sparsity: float) -> None:
    shapes = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    counts = [math.prod(shape) for shape in shapes]
    fractions = erdos_renyi(shapes, sparsity)
    assert sum(f * n for f, n in zip(fractions, counts, strict=True)) == pytest.approx(sparsity * sum(counts))


def test_the_largest_remainders_get_what_rounding_down_left() -> None:
    assert largest_remainder([1.2, 2.7, 3.1], 7, [0, 0, 0], [9, 9, 9]) == [1, 3, 3]
    assert largest_remainder([0.5, 0.5, 0.5, 0.5], 2, [0] * 4, [9] * 4) == [1, 1, 0, 0]


def test_a_bound_is_kept_and_the_others_take_the_difference_by_their_room() -> None:
    assert largest_remainder([5.0, 5.0, 5.0], 15, [0, 9, 0], [10, 10, 10]) == [3, 9, 3]
    assert largest_remainder([5.0, 5.0, 5.0], 15, [0, 0, 0], [2, 20, 20]) == [2, 7, 6]


def test_what_the_bounds_forbid_is_taken_as_near_as_they_allow() -> None:
    assert largest_remainder([5.0, 5.0], 10, [0, 0], [3, 4]) == [3, 4]
    assert largest_remainder([0.0, 0.0], 0, [2, 1], [3, 4]) == [2, 1]


def test_any_numbers_within_any_bounds_add_up() -> None:
    draw = random.Random(0)
    for _ in range(500):
        size = draw.randint(1, 9)
        most = [draw.randint(0, 1000) for _ in range(size)]
        least = [draw.randint(0, high) for high in most]
        total = draw.randint(sum(least), sum(most))
        wanted = [draw.random() * 1000 for _ in range(size)]
        given = largest_remainder(wanted, total, least, most)
        assert sum(given) == total
        assert all(low <= now <= high for low, now, high in zip(least, given, most, strict=True))


def test_rounding_moves_no_share_by_one_or_more_where_the_bounds_are_far() -> None:
    counts = [7, 31, 1001, 12_345]
    for sparsity in (0.1, 0.37, 0.5, 0.9):
        wanted = [sparsity * count for count in counts]
        given = largest_remainder(wanted, round(sparsity * sum(counts)), [0] * 4, counts)
        assert all(abs(now - want) <= 1 for now, want in zip(given, wanted, strict=True))


def test_the_smallest_layers_are_spared_while_they_hold_next_to_nothing() -> None:
    counts = [216, 5184, 5184, 10368, 20736, 1152, 41472, 82944, 4608, 960]  # R8(24): its stem first, its head last
    assert small_layers(counts, 0.9) == {0, 9}
    assert small_layers(counts, 0.99) == set()  # nothing is left to make up for them


def test_no_layer_is_spared_among_layers_of_one_size_or_in_a_tiny_net() -> None:
    assert small_layers([1000] * 200, 0.5) == set()
    assert small_layers([8, 12], 0.5) == set()
    assert small_layers([36], 0.5) == set()


def test_what_is_spared_at_more_sparsity_was_spared_at_less() -> None:
    counts = [9, 90, 900, 100_000, 100_000]
    sets = [small_layers(counts, sparsity) for sparsity in (0.0, 0.5, 0.9, 0.95, 0.99, 0.999)]
    assert all(more <= less for less, more in itertools.pairwise(sets))
    assert sets[0] == {0, 1, 2}
    assert sets[-1] != sets[0]


def test_a_linear_schedule_takes_the_same_each_round() -> None:
    assert round_targets("linear", 0.9, 3) == pytest.approx([0.3, 0.6, 0.9])


def test_a_cubic_schedule_follows_zhu_and_gupta() -> None:
    assert round_targets("cubic", 0.8, 4) == pytest.approx([0.8 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)])
    assert round_targets("cubic", 0.9, 2, start=0.5) == pytest.approx([0.85, 0.9])


def test_a_cubic_schedule_takes_less_each_round() -> None:
    amounts = [0.0, *round_targets("cubic", 0.9, 6)]
    steps = [after - before for before, after in itertools.pairwise(amounts)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] > 0


def test_one_shot_is_one_round_however_many_are_asked_for() -> None:
    assert round_targets("one_shot", 0.9, 5) == [0.9]


@pytest.mark.parametrize("shape", ["one_shot", "linear", "cubic"])
@pytest.mark.parametrize("goal", [0.1, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_the_last_amount_is_the_goal_to_the_last_bit(shape: str, goal: float, rounds: int) -> None:
    amounts = round_targets(shape, goal, rounds)
    assert amounts[-1] == goal
    assert amounts == sorted(set(amounts))
    assert all(0 < amount <= 1 for amount in amounts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("spiral", 0.9, 3), "is not a schedule"),
        (("linear", 0.9, 0), "0 rounds"),
        (("linear", 0.5, 3, 0.5), "cannot go from 0.5 to 0.5"),
        (("cubic", 0.5, 3, 0.9), "cannot go from 0.9 to 0.5"),
        (("linear", 0.0, 3), "cannot go from 0 to 0"),
        (("linear", 1.5, 3), "cannot go"),
        (("linear", float("nan"), 3), "cannot go"),
    ],
)
def test_an_impossible_schedule_is_refused(arguments: tuple[str, float, int], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        round_targets(*arguments)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; import omgoptim.techniques.prune._unstructured.sparsity_allocation; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
