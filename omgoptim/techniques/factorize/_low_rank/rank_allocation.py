"""Rank allocation: for one layer, or over all layers so that the whole model reaches a size.

Every layer is dense or has one of its options; each step down costs accuracy of the model's output and saves parameters
(or time). On the lower convex hull of a layer's options the cost per saving only grows, so repeatedly taking the
cheapest step over all layers gives the least cost for the saving. The budget left after the last step then goes to the
layers that regain most with it. Functions of plain numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.reports import Skip
from omgoptim.techniques.factorize._low_rank.problem import RankOption, empty_block
from omgoptim.techniques.probe import layer_calls
from omgoptim.techniques.prune._latency.layer_benchmark import fastest_block_ms, open_bench
from omgoptim.techniques.reconstruction.inputs import DenseLayer
from omgoptim.techniques.registry import ModuleRun

COMPRESSION_TOLERANCE = 0.02
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


def within_params(options: Sequence[RankOption], params: int) -> RankOption | None:
    """Return the option of least loss with at most so many parameters; the smaller of equals."""
    fitting = [option for option in options if option.params <= params]
    return min(fitting, key=lambda option: (option.error, option.params)) if fitting else None


def with_energy(options: Sequence[RankOption], energy: float, total: float) -> RankOption | None:
    """Return the option with the fewest parameters that keeps a fraction `energy` of `total`."""
    max_error = (1 - energy) * total
    kept = [option for option in options if option.error <= max_error * (1 + 1e-9)]
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
        compression: total over what is left, to reach within `COMPRESSION_TOLERANCE`.

    Raises:
        TechniqueError: the compression cannot be reached, or not within `COMPRESSION_TOLERANCE`.
    """
    budget = int(total / compression) - elsewhere
    smallest = sum(min([layer.params, *(option.params for option in layer.options)]) for layer in layers.values())
    if smallest > budget:
        raise _unreachable(layers, elsewhere, total, compression, smallest)
    chosen = _descend(layers, budget)
    _spend_remaining(layers, chosen, budget)
    reached = total / (elsewhere + sum(_params(layers[path], index) for path, index in chosen.items()))
    if reached > compression * (1 + COMPRESSION_TOLERANCE):
        raise TechniqueError(
            f"no choice of ranks gives a compression of {compression:g} within {COMPRESSION_TOLERANCE:.0%}",
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


def _spend_remaining(layers: Mapping[str, RankChoice], chosen: dict[str, int], budget: int) -> None:
    """Spend the rest of the budget on the layers that regain most per parameter, as long as something fits."""
    points = {path: {point.index: point for point in _points(layer)} for path, layer in layers.items()}
    remaining = budget - sum(_params(layers[path], index) for path, index in chosen.items())
    while True:
        gains = []
        for path, index in chosen.items():
            current = points[path][index]
            for point in points[path].values():
                more = point.params - current.params
                if 0 < more <= remaining and point.error <= current.error:
                    gains.append(((current.error - point.error) / more, path, point.index, more))
        if not gains:
            return
        _, path, index, more = max(gains)
        chosen[path] = index
        remaining -= more


def _unreachable(
    layers: Mapping[str, RankChoice], elsewhere: int, total: int, compression: float, smallest: int
) -> TechniqueError:
    best = total / (elsewhere + smallest)
    share = elsewhere / total
    reachable = f"{max(1.0, int(best * 0.99 * 100) / 100):g}"
    return TechniqueError(
        f"a compression of {compression:g} cannot be reached: the maximum is {best:.3g}",
        f"{elsewhere:,} of {total:,} parameters ({share:.0%}) are in layers that are not factorized (embeddings, "
        f"norms, layers that no rank makes smaller or, with a latency target, faster); the other {len(layers)} need "
        f"{smallest:,} at their smallest ranks",
        f"use target_compression {reachable} or less, or rank_ratio, which counts only the factorized layers",
    )


MAX_MEASURED_RANKS = 6
"""Maximum measured ranks of a layer; between them time is interpolated. Chosen: each costs `TURNS` visits."""

TURNS = 3
"""Visits of each measurement point, of which the fastest counts. Chosen: two of three may be disturbed."""

BLOCK_S = 0.005
"""Seconds of a block of calls. Chosen: above the clock's and the scheduler's resolution, short for every point."""

SIZE_TIE_BREAK = 1e-6
"""Fraction of a layer's time that its parameters count for. Chosen small: of equally fast ranks the smaller wins."""


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Measured times of a layer in one forward."""

    dense_ms: float
    ranks_ms: tuple[float, ...]
    """Times of the measured options."""


def measure_times(
    module: nn.Module, layers: Mapping[str, RankChoice], run: ModuleRun, skipped: list[Skip]
) -> dict[str, RankChoice]:
    """Return the layers with the times of their options, less the options that are no faster.

    Args:
        module: where the layers are; run once to see the shapes.
        layers: path to its options.
        run: gives engine, device and threads.
        skipped: gets the layers that no rank makes faster.
    """
    parts: dict[str, DenseLayer] = {path: module.get_submodule(path) for path in layers}  # type: ignore[misc]
    uses = layer_calls(module, parts, run, samples=1)
    measured: dict[tuple[Any, ...], RankTimes] = {}
    timed = {}
    for count, (path, choice) in enumerate(layers.items()):
        picked = options_to_measure(choice.options)
        key = (repr(parts[path]), uses[path].shapes, tuple((option.form, option.ranks) for option in picked))
        if key not in measured:
            measured[key] = measure_options(parts[path], picked, uses[path].shapes, run)
        faster = with_times(choice, picked, measured[key])
        if faster.options:
            timed[path] = faster
        else:
            best, dense = min(measured[key].ranks_ms), measured[key].dense_ms
            reason = f"no rank is faster on {run.runtime}: at best {best:.3f} ms, dense {dense:.3f} ms"
            skipped.append(Skip(path=path, reason=reason, kind="no_benefit"))
        run.progress("timing ranks", 0.4 + 0.1 * (count + 1) / len(layers))
    return timed


def options_to_measure(options: Sequence[RankOption]) -> list[RankOption]:
    """Return the options to measure, from the smallest to the largest, evenly spread."""
    places = sorted({round(place) for place in np.linspace(0, len(options) - 1, MAX_MEASURED_RANKS)})
    return [options[place] for place in places]


def with_times(choice: RankChoice, picked: Sequence[RankOption], times: RankTimes) -> RankChoice:
    """Return the options that are faster than the layer, with times that never fall as parameters grow."""
    rising = np.maximum.accumulate(times.ranks_ms)
    interpolated = np.interp([o.params for o in choice.options], [o.params for o in picked], rising)
    slope = SIZE_TIE_BREAK * times.dense_ms / choice.params
    ms = [
        float(ms_of_option) + slope * option.params
        for option, ms_of_option in zip(choice.options, interpolated, strict=True)
    ]
    faster = [index for index, ms_of_option in enumerate(ms) if ms_of_option < times.dense_ms]
    return replace(
        choice,
        options=tuple(choice.options[index] for index in faster),
        losses=tuple(choice.losses[index] for index in faster),
        times_ms=tuple(ms[index] for index in faster),
        time_ms=times.dense_ms,
    )


def measure_options(
    layer: DenseLayer, picked: Sequence[RankOption], shapes: Sequence[tuple[int, ...]], run: ModuleRun
) -> RankTimes:
    """Return the milliseconds of the layer and of the blocks in its place, summed over its calls in one forward."""
    timed: list[nn.Module] = [layer, *(empty_block(layer, option) for option in picked)]
    totals = [0.0] * len(timed)
    with open_bench(run) as bench:
        for shape in sorted(set(shapes)):
            best = [float("inf")] * len(timed)
            for _ in range(TURNS):
                for index, module in enumerate(timed):
                    best[index] = min(best[index], fastest_block_ms(*bench.open_module(module, shape), BLOCK_S))
            totals = [total + shapes.count(shape) * ms for total, ms in zip(totals, best, strict=True)]
    return RankTimes(totals[0], tuple(totals[1:]))
