from __future__ import annotations

from collections.abc import Callable

import pytest

from omgoptim.techniques.distill._student.proposals import BUILDS, largest_within


def channels(fixed: int = 0, full: int = 24) -> Callable[[float], int]:
    """Parameters of a network whose channels are whole numbers: steps."""
    return lambda x: fixed + 300 * max(1, int(full * x + 0.5)) ** 2


@pytest.mark.parametrize("fixed", [0, 10_000])
@pytest.mark.parametrize("full", [24, 500])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1])
def test_it_is_near_the_largest_within_the_goal_in_few_counts(fixed: int, full: int, share: float) -> None:
    count, counted = channels(fixed, full), []

    def counting(x: float) -> int:
        counted.append(x)
        return count(x)

    goal = fixed + share * (count(1.0) - fixed)
    x, found = largest_within(counting, goal, 0.01)
    assert x is not None
    assert found == count(x) <= goal
    best = max(count(step / 1000) for step in range(1, 1001) if count(step / 1000) <= goal)
    assert found >= 0.93 * best
    assert len(counted) <= BUILDS + 1


def test_everything_is_within_a_large_goal() -> None:
    assert largest_within(channels(), 1e9, 0.01) == (1.0, 300 * 24**2)
    assert largest_within(channels(), 1e9, 0.01, most=0.5) == (0.5, 300 * 12**2)


def test_a_goal_below_the_minimum_gives_none_and_the_minimum() -> None:
    assert largest_within(channels(10_000), 9_000, 0.02) == (None, 10_300)


def test_a_straight_line_is_met_at_once() -> None:
    counted = []

    def count(x: float) -> int:
        counted.append(x)
        return int(1000 + 9000 * x)

    x, found = largest_within(count, 5_500, 0.02, most=0.9, power=1)
    assert x is not None
    assert 0.97 * 5_500 <= found <= 5_500
    assert len(counted) <= 4


@pytest.mark.parametrize("share", [0.8, 0.25, 0.05])
def test_a_count_that_falls_otherwise_than_expected_is_bracketed_all_the_same(share: float) -> None:
    """One large layer that grows with the width, little that grows with its square: false position stuck at 58x."""

    def count(x: float) -> int:
        width = max(1, int(128 * x + 0.5))
        return 3 + 432 * width + max(1, int(12 * x + 0.5)) * 9

    counted: list[float] = []

    def counting(x: float) -> int:
        counted.append(x)
        return count(x)

    goal = share * count(1.0)
    x, found = largest_within(counting, goal, 0.02)
    best = max(count(step / 1000) for step in range(20, 1001) if count(step / 1000) <= goal)
    assert x is not None
    assert found == count(x)
    assert 0.95 * best <= found <= goal
    assert len(counted) <= BUILDS + 1


@pytest.mark.parametrize("cliff", [0.021, 0.3, 0.5, 0.999])
def test_a_cliff_is_found_wherever_it_is(cliff: float) -> None:
    assert largest_within(lambda x: 10 if x < cliff else 1000, 500, 0.02) == (pytest.approx(cliff - 0.001), 10)
