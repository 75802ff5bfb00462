"""The largest number whose count stays within a goal, with few counts: each one is a model that is built."""

from __future__ import annotations

import math
from collections.abc import Callable

BUILDS = 8
CLOSE = 0.97
"""A count of at least this fraction of the goal is near enough."""
STEPS = 1000
"""Numbers are tried in steps of one over this."""
FIRST_STEP = 0.02
"""Fraction of a number that the next one is away where the count did not change."""


def largest(
    count: Callable[[float], int], goal: float, least: float, most: float = 1.0, power: float = 2
) -> tuple[float | None, int]:
    """About the largest x in least..most with count(x) <= goal, and its count; None and the count at `least` else.

    The next x is read off a curve a + b x^power through the two counts nearest to the goal. Counts are steps, widths
    being whole numbers: where one did not change since the last, the next x is further and further away.

    Args:
        count: grows with x; called at most `BUILDS` times and once for `least`.
    """
    high = (most, count(most))
    if high[1] <= goal:
        return high
    low: tuple[float, int] | None = None
    beyond, step = (0.0, 0), 0.0
    for _ in range(BUILDS - 1):
        x = high[0] + step if step < 0 else (low or beyond)[0] + step
        if not step:
            x = _between(low or beyond, high, goal, power)
        x = max(least, math.floor(x * STEPS) / STEPS)
        known = (low[0] if low else least - 1 / STEPS, high[0])
        if not known[0] < x < known[1]:
            x = math.floor((known[0] + known[1]) / 2 * STEPS) / STEPS
            if not known[0] < x < known[1]:
                break
        found = (x, count(x))
        flat = found[1] in (high[1], low[1] if low else None)
        step = math.copysign(max(2 * abs(step), FIRST_STEP * x), goal - found[1]) if flat else 0.0
        if found[1] > goal:
            if low is None:  # more is fixed than was thought
                beyond = _at_nothing(found, high, power)
            high = found
        else:
            low = found
            if low[1] >= CLOSE * goal:
                break
    if low is None:
        last = high if high[0] <= least else (least, count(least))
        return last if last[1] <= goal else (None, last[1])
    return low


def _between(low: tuple[float, int], high: tuple[float, int], goal: float, power: float) -> float:
    """Where the curve through two points reaches the goal."""
    if high[1] <= low[1]:
        return (low[0] + high[0]) / 2
    share = (goal - low[1]) / (high[1] - low[1])
    raised = low[0] ** power + max(share, 0.0) * (high[0] ** power - low[0] ** power)
    return float(max(raised, 0.0) ** (1 / power))


def _at_nothing(near: tuple[float, int], far: tuple[float, int], power: float) -> tuple[float, int]:
    """The point at x = 0 of the curve through two points."""
    slope = (far[1] - near[1]) / (far[0] ** power - near[0] ** power)
    return 0.0, max(0, int(near[1] - slope * near[0] ** power))
