"""Grid of candidate widths of a group, and the layer sizes that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from omgoptim.techniques.prune._channels.groups import Group, Place
from omgoptim.techniques.prune._latency.latency_table import Side

LEAST_KEPT = 0.1
"""Minimum measured width as a fraction of a group's width."""


def widths_of(group: Group, count: int, round_to: int | None = None, least: float = LEAST_KEPT) -> tuple[int, ...]:
    """Return at most `count` candidate widths of a group, evenly spread, ascending, the last one full.

    Multiples of its unit and of `round_to` (as `Group.step` takes it), from the fraction `least` of its width on. Where
    that leaves nothing below the full width, multiples of the unit alone.
    """
    for step in (group.step(round_to), group.unit):
        first = step * max(1, math.ceil(group.width * least / step - 1e-9))
        steps = list(range(first, group.width, step))
        if steps:
            break
    return spread([*steps, group.width], count)


def side_of(size: int, places: Sequence[tuple[Group, Place]]) -> Side:
    """Return how a side of `size` features depends on the groups with places on it."""
    features: dict[str, int] = {}
    for group, place in places:
        features[group.name] = features.get(group.name, 0) + len(place.positions) // group.width
    decided = {group.name: features[group.name] * group.width for group, _ in places}
    return Side(size - sum(decided.values()), tuple(features.items()))


def sizes_of(
    side: Side, candidates: Mapping[str, tuple[int, ...]], full: Mapping[str, int], count: int
) -> tuple[int, ...]:
    """Return the sizes of a side when its groups shrink together, the full one last."""
    some = {name: spread(candidates[name], count) for name, _ in side.parts}
    steps = max((len(widths) for widths in some.values()), default=1)
    sizes = {
        side.size({**full} | {name: widths[max(0, len(widths) - steps + step)] for name, widths in some.items()})
        for step in range(steps)
    }
    return tuple(sorted(sizes))


def spread(values: Sequence[int], count: int) -> tuple[int, ...]:
    """Return `count` of ascending values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return tuple(values)
    return tuple(values[round(step * (len(values) - 1) / (count - 1))] for step in range(count))
