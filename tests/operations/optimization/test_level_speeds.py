"""Speeds of untrained levels: steps of the engine, expected speeds between them, and one real measurement."""

from __future__ import annotations

import pytest

from omgoptim.operations.optimization.level_speeds import LevelSpeeds
from omgoptim.operations.quantization.selection import Preference

LEVELS = [0.0, 0.25, 0.5, 0.75]
SPEED, SIZE = Preference("speed", 1000), Preference("size", 1000)


def measured(*quantized: float | None) -> LevelSpeeds:
    return LevelSpeeds(1.0, LEVELS, [1.0, 1.2, 1.5, 2.0], list(quantized), [1000, 700, 400, 200])


@pytest.mark.parametrize(
    ("quantized", "preference", "edges"),
    [
        ((4.0, 4.05, 8.0, 8.1), SPEED, [0.5]),
        ((4.0, 3.0, 8.0, 9.0), SPEED, [0.5, 0.75]),
        ((4.0, 4.0, 4.0, 4.0), SPEED, []),
        ((4.0, 4.0, 4.0, 4.0), SIZE, [0.25, 0.5, 0.75]),
        ((None, None, None, None), SPEED, [0.25, 0.5, 0.75]),  # no speed could be measured: sizes decide
    ],
)
def test_an_edge_is_better_than_every_shallower_level(
    quantized: tuple[float | None, ...], preference: Preference, edges: list[float]
) -> None:
    assert measured(*quantized).worthwhile_levels(preference) == edges


def test_between_two_levels_the_edge_nearest_their_middle_is_next() -> None:
    speeds = measured(4.0, 4.0, 8.0, 9.0)
    assert speeds.next_level(0.0, 0.9, SPEED) == 0.5
    assert speeds.next_level(0.5, 0.9, SPEED) == 0.75
    assert speeds.next_level(0.0, 0.5, SPEED) is None
    assert speeds.next_level(0.75, 0.95, SPEED) == 0.85  # where nothing was measured the middle is


def test_expected_speeds_are_those_of_latencies_between_the_measured_levels() -> None:
    speeds = measured(4.0, 5.0, 8.0, 10.0)
    assert speeds.expected_quantized(0.5) == 8.0
    assert speeds.expected_quantized(0.625) == pytest.approx(2 / (1 / 8 + 1 / 10))
    assert speeds.expected_eager(0.8) is None
    assert LevelSpeeds().expected_eager(0.5) is None


def test_factorizing_pays_where_it_has_more_merit() -> None:
    assert not LevelSpeeds().is_factorizing_worthwhile(SPEED)
    slower = LevelSpeeds(factorized=0.8, factorized_size=1.4)
    assert not slower.is_factorizing_worthwhile(SPEED)
    assert slower.is_factorizing_worthwhile(SIZE)
