"""Monotone search: the largest x whose count is within a goal, with few evaluations (each builds a model).

Numbers are tried in steps of 1/1000, and a count never falls as they grow: a monotone search over integers, which
bisection ends in ten counts whatever the curve. The first tries are read off the curve that the count is expected to
follow, which is near at once where it does; false position alone sticks at one end where it does not (a layer behind a
flattened map grows with the width, others with its square). A root finder of a library (scipy's brentq, no dependency
here) wants a continuous function, and this one is made of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

ON_THE_CURVE = 3
"""Interpolation steps before bisection."""
BUILDS = ON_THE_CURVE + 10
"""Maximum evaluations beside that at the upper end: ten bisections end a search over 1,000 steps."""
CLOSE = 0.97
"""Fraction of the goal at which the search stops: the last 3 % of the size are not worth more builds."""
STEPS = 1000
"""Resolution of the search: x is a multiple of 1/1000."""


def largest_within(
    count: Callable[[float], int], goal: float, least: float, most: float = 1.0, power: float = 2
) -> tuple[float | None, int]:
    """Return about the largest x in least..most with count(x) <= goal, and its count; None and count(least) else.

    The bracket is kept: count(low) <= goal < count(high). The first tries are where the curve a + b x^power through its
    ends reaches the goal, then it is halved.

    Args:
        count: does not fall with x; called at most `BUILDS` + 1 times.
        goal: upper bound of the count.
        least: lower end of x, 0..1.
        most: upper end of x, 0..1.
        power: exponent of the curve, 2 where parameters go with the square of the width.
    """
    high, low = round(most * STEPS), round(least * STEPS) - 1  # what fits lies above low, what is too large at high
    at = {high: count(most)}
    if at[high] <= goal:
        return most, at[high]
    start, at[0] = 0, 0  # the curve begins at nothing until a count within the goal is known
    for tried in range(BUILDS):
        if high - low <= 1:
            break
        x = _on_curve(start, high, at, goal, power) if tried < ON_THE_CURVE else (low + high) // 2
        x = min(max(x, low + 1), high - 1)
        at[x] = count(x / STEPS)
        if at[x] <= goal:
            start = low = x
            if at[x] >= CLOSE * goal:
                break
        else:
            if start == 0:  # more is fixed than was thought
                at[0] = max(at[0], _fixed((x, at[x]), (high, at[high]), power))
            high = x
    return (low / STEPS, at[low]) if start else (None, at[high])


def _on_curve(low: int, high: int, at: dict[int, int], goal: float, power: float) -> int:
    """Where the curve through two points reaches the goal, rounded down."""
    if at[high] <= at[low]:
        return (low + high) // 2
    share = max((goal - at[low]) / (at[high] - at[low]), 0.0)
    raised = float(low) ** power + share * (float(high) ** power - float(low) ** power)
    return math.floor(float(raised ** (1 / power)))


def _fixed(near: tuple[int, int], far: tuple[int, int], power: float) -> int:
    """The count at 0 of the curve through two points: what does not fall with x."""
    slope = (far[1] - near[1]) / (float(far[0]) ** power - float(near[0]) ** power)
    return max(0, int(near[1] - slope * float(near[0]) ** power))
