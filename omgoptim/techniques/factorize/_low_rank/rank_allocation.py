"""Rank allocation: for one layer, or over all layers so that the whole model reaches a size.

Every layer is dense or has one of its options; each step down costs accuracy of the model's output and saves parameters
(or time). On the lower convex hull of a layer's options the cost per saving only grows, so repeatedly taking the
cheapest step over all layers gives the least cost for the saving. The budget left after the last step then goes to the
layers that regain most with it. Functions of plain numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omgoptim.errors import TechniqueError
from omgoptim.techniques.factorize._low_rank.problem import RankOption

TOLERANCE = 0.02
"""Largest relative distance of the reached compression from the target. Chosen: less refuses coarse ranks."""


@dataclass(frozen=True, slots=True)
class RankChoice:
    """A layer that may be factorized."""

    params: int
    """Parameters of the dense layer."""
    options: tuple[RankOption, ...]
    """Smaller options."""
    losses: tuple[float, ...]
    """Loss of each option, in units that are comparable between layers; 0 for the dense layer."""
    times_ms: tuple[float, ...] | None = None
    """Time of each option, where the target is a time."""
    time_ms: float | None = None
    """Time of the dense layer."""


@dataclass(frozen=True, slots=True)
class _Point:
    cost: float
    error: float
    params: int
    index: int
    """Cost of an option; -1 is the dense layer."""


def within(options: Sequence[RankOption], params: int) -> RankOption | None:
    """Return the option of least loss with at most so many parameters; the smaller of equals."""
    fitting = [option for option in options if option.params <= params]
    return min(fitting, key=lambda option: (option.error, option.params)) if fitting else None


def with_energy(options: Sequence[RankOption], energy: float, total: float) -> RankOption | None:
    """Return the option with the fewest parameters that keeps a fraction `energy` of `total`."""
    most = (1 - energy) * total
    kept = [option for option in options if option.error <= most * (1 + 1e-9)]
    return min(kept, key=lambda option: (option.params, option.error)) if kept else None


def pareto(options: Sequence[RankOption]) -> list[RankOption]:
    """Return the Pareto-optimal options in parameters and error, the smallest first."""
    best: list[RankOption] = []
    for option in sorted(options, key=lambda option: (option.params, option.error)):
        if not best or option.error < best[-1].error:
            best.append(option)
    return best


def allocate_ranks(
    layers: Mapping[str, RankChoice], elsewhere: int, total: int, compression: float
) -> dict[str, RankOption]:
    """Return the option of each layer that is factorized, by path.

    Args:
        layers: by path.
        elsewhere: parameters of the model that no option changes.
        total: parameters of the model before.
        compression: total over what is left, to reach within `TOLERANCE`.

    Raises:
        TechniqueError: the compression cannot be reached, or not within `TOLERANCE`.
    """
    budget = int(total / compression) - elsewhere
    least = sum(min([layer.params, *(option.params for option in layer.options)]) for layer in layers.values())
    if least > budget:
        raise _out_of_reach(layers, elsewhere, total, compression, least)
    chosen = _descend(layers, budget)
    _spend(layers, chosen, budget)
    reached = total / (elsewhere + sum(_params(layers[path], index) for path, index in chosen.items()))
    if reached > compression * (1 + TOLERANCE):
        raise TechniqueError(
            f"no choice of ranks gives a compression of {compression:g} within {TOLERANCE:.0%}",
            f"the nearest compression that the candidate ranks reach is {reached:.3g}",
            f"use round_to 1 (more candidate ranks), or target_compression {reached:.3g}",
        )
    return {path: layers[path].options[index] for path, index in chosen.items() if index >= 0}


def _params(layer: RankChoice, index: int) -> int:
    return layer.params if index < 0 else layer.options[index].params


def _points(layer: RankChoice) -> list[_Point]:
    """Return the dense layer and the options that save something, from the costliest down."""
    by_time = layer.times_ms is not None and layer.time_ms is not None
    points = [_Point(layer.time_ms if by_time else layer.params, 0.0, layer.params, -1)]  # type: ignore[arg-type]
    for index, option in enumerate(layer.options):
        cost = layer.times_ms[index] if by_time else float(option.params)  # type: ignore[index]
        points.append(_Point(cost, layer.losses[index], option.params, index))
    return sorted((p for p in points if p.index < 0 or p.cost < points[0].cost), key=lambda p: (-p.params, p.error))


def _hull(layer: RankChoice) -> list[_Point]:
    """Return the lower convex hull of error over cost, from the dense layer down."""
    hull: list[_Point] = []
    for point in _points(layer):
        if hull and (point.cost >= hull[-1].cost):
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(above: _Point, below: _Point) -> float:
    """Return the loss per saving of a step down."""
    return (below.error - above.error) / (above.cost - below.cost)


def _descend(layers: Mapping[str, RankChoice], budget: int) -> dict[str, int]:
    """Take the cheapest steps until the parameters fit the budget; return each layer's option index by path."""
    hulls = {path: _hull(layer) for path, layer in layers.items()}
    heap = [(_slope(hull[0], hull[1]), path, 1) for path, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(heap)
    chosen = dict.fromkeys(layers, -1)
    used = sum(layer.params for layer in layers.values())
    while used > budget and heap:
        _, path, step = heapq.heappop(heap)
        hull = hulls[path]
        used -= hull[step - 1].params - hull[step].params
        chosen[path] = hull[step].index
        if step + 1 < len(hull):
            heapq.heappush(heap, (_slope(hull[step], hull[step + 1]), path, step + 1))
    return chosen


def _spend(layers: Mapping[str, RankChoice], chosen: dict[str, int], budget: int) -> None:
    """Spend the rest of the budget on the layers that regain most per parameter, as long as something fits."""
    points = {path: {point.index: point for point in _points(layer)} for path, layer in layers.items()}
    left = budget - sum(_params(layers[path], index) for path, index in chosen.items())
    while True:
        gains = []
        for path, index in chosen.items():
            now = points[path][index]
            for point in points[path].values():
                more = point.params - now.params
                if 0 < more <= left and point.error <= now.error:
                    gains.append(((now.error - point.error) / more, path, point.index, more))
        if not gains:
            return
        _, path, index, more = max(gains)
        chosen[path] = index
        left -= more


def _out_of_reach(
    layers: Mapping[str, RankChoice], elsewhere: int, total: int, compression: float, least: int
) -> TechniqueError:
    best = total / (elsewhere + least)
    share = elsewhere / total
    policy = f"{max(1.0, int(best * 0.99 * 100) / 100):g}"
    return TechniqueError(
        f"a compression of {compression:g} cannot be reached: the maximum is {best:.3g}",
        f"{elsewhere:,} of {total:,} parameters ({share:.0%}) are in layers that are not factorized (embeddings, "
        f"norms, layers that no rank makes smaller or, with a latency target, faster); the other {len(layers)} need "
        f"{least:,} at their smallest ranks",
        f"use target_compression {policy} or less, or rank_ratio, which counts only the factorized layers",
    )
