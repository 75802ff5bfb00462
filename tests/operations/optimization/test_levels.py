"""The deepest level within the guard is found by bisection."""

from __future__ import annotations

import pytest

from omgoptim.operations.optimization.chain import deepest_level


@pytest.mark.parametrize(("limit", "found"), [(0.95, 0.85), (0.62, 0.6), (0.3, 0.25), (0.05, None)])
def test_the_level_found_is_within_and_the_bracket_narrows(limit: float, found: float | None) -> None:
    tried: list[float] = []

    def result(level: float) -> float | None:
        tried.append(level)
        return level if level <= limit else None

    best = deepest_level(result, first=0.5, most=4)
    assert len(tried) <= 4
    if found is None:
        assert best is None
    else:
        assert best is not None
        assert best[0] == best[1] == pytest.approx(found, abs=0.06)
        assert best[0] <= limit


def test_a_level_that_fails_counts_as_too_deep() -> None:
    best = deepest_level(lambda level: None if level > 0.3 else level, first=0.5, most=3)
    assert best == (0.25, 0.25)


def test_the_search_ends_once_the_bracket_is_narrow() -> None:
    tried = []
    deepest_level(lambda level: tried.append(level), first=0.5, most=50)
    assert len(tried) < 6


def test_levels_are_those_that_are_given_and_none_left_ends_the_search() -> None:
    tried = []

    def result(level: float) -> float | None:
        tried.append(level)
        return level if level <= 0.65 else None

    steps = (0.25, 0.6, 0.7)
    found = deepest_level(
        result,
        first=0.25,
        narrow=0.0,
        between=lambda low, high: next((level for level in reversed(steps) if low < level < high), None),
    )
    assert tried == [0.25, 0.7, 0.6]
    assert found == (0.6, 0.6)
