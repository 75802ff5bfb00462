"""Bisection to the strongest compression whose quality drop is within the guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def deepest_level(
    result: Callable[[float], Found | None],
    within: Callable[[Found], bool],
    *,
    first: float,
    low: float = 0.0,
    high: float = 0.9,
    most: int = 4,
    narrow: float = 0.08,
    between: Callable[[float, float], float | None] = lambda low, high: round((low + high) / 2, 3),
) -> tuple[float, Found] | None:
    """Return the deepest level found whose result is within the guard, with that result; None if none is.

    Args:
        result: does a level, 0..1, and returns what came of it; None where it failed, which counts as too deep.
        within: whether a result is within the guard.
        first: the level to begin with, between low and high.
        low: a level that passes, 0..1.
        high: a level that fails, 0..1.
        most: attempts.
        narrow: width of the bracket that ends the search.
        between: the next level between the deepest that holds and the shallowest that does not; None ends the search.
    """
    best: tuple[float, Found] | None = None
    level = first
    for _ in range(most):
        found = result(level)
        if found is not None and within(found):
            low, best = level, (level, found)
        else:
            high = level
        if high - low <= narrow:
            break
        following = between(low, high)
        if following is None:
            break
        level = following
    return best
