"""Multiple-choice knapsack: one option of each group, the least loss within a budget. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

MOST_STATES = 20_000
"""Maximum states of the exact knapsack; beyond it the best state of each of as many equal time steps is kept."""

TINY = 1e-12
"""Tolerance of comparisons of float64 sums of losses."""

Choice = tuple[int, ...]
"""For each group, the index of an option."""


def multiple_choice(
    times: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> Choice | None:
    """Return one option per group with the least total loss within the budget; None if there is none.

    Exact (states that another beats in both time and loss are dropped) up to `MOST_STATES` states; times may be
    negative: they are differences to a point.

    Args:
        times: per group and option.
        losses: per group and option.
        budget: in the unit of `times`.
    """
    least_left = [0.0]
    for some in reversed(times):
        least_left.append(least_left[-1] + min(some))
    states: list[tuple[float, float, Choice]] = [(0.0, 0.0, ())]
    for g, (some, lost) in enumerate(zip(times, losses, strict=True)):
        room = budget - least_left[len(times) - g - 1] + 1e-9 * max(abs(budget), TINY)
        grown = (
            (spent + ms, loss + lost[option], (*chosen, option))
            for spent, loss, chosen in states
            for option, ms in enumerate(some)
            if spent + ms <= room
        )
        states = _undominated(sorted(grown))
        if not states:
            return None
    return min(states, key=lambda state: (state[1], state[0]))[2]


def _undominated(states: Sequence[tuple[float, float, Choice]]) -> list[tuple[float, float, Choice]]:
    """Return, of states sorted by time, those that lose less than every faster one; thinned to `MOST_STATES`."""
    kept: list[tuple[float, float, Choice]] = []
    for state in states:
        if not kept or state[1] < kept[-1][1] - TINY:
            kept.append(state)
    if len(kept) <= MOST_STATES:
        return kept
    step = (kept[-1][0] - kept[0][0]) / MOST_STATES
    bins = {int((state[0] - kept[0][0]) / step): state for state in kept}  # the last of a bin loses least
    return [kept[0], *(state for state in bins.values() if state is not kept[0])]
