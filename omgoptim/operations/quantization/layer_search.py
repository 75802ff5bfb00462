"""Search for the layers to keep in float so that the quality guard passes; pure functions on numbers.

Layers are ranked by predicted noise over the cost of keeping them in float. The first guess is the shortest head of the
ranking whose remaining noise fits the guard. From there the head grows or shrinks by 1, 2, 4, … layers until the result
changes, followed by a bisection. At last layers are quantized again: first, together, those without which the predicted
noise stays below that of sets that failed, then the costliest one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from omgoptim.models.globs import matches
from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.techniques.quantize._diagnostics.sensitivity import SensitivityReport

REQUANTIZE_EVALUATIONS = 3
"""Maximum evaluations for quantizing layers again, costliest first: each saves less than the one before."""

MIN_REQUANTIZE_COST = 0.1
"""Share of the cost of all layers in float below which a layer is not worth an evaluation. Chosen: less would not show
in the measured latency."""

MIN_NOISE_SHARE = 0.1
"""Minimum share of the noise that the first guess leaves, since a small guard would select all layers."""


@dataclass(frozen=True, slots=True)
class SearchLayer:
    """A layer that can be kept in float."""

    name: str
    """Its name in `ignore`."""
    path: str
    size_bytes: int
    """Bytes of its float weights."""
    noise: float
    """Predicted noise-to-signal power ratio at the output."""


@dataclass(frozen=True, slots=True)
class EvaluatedSet:
    """An evaluated set of layers in float and its quality drop; infinite if it could not be built."""

    kept: tuple[str, ...]
    drop: float


@dataclass(frozen=True, slots=True)
class LayerSets:
    """Evaluation and prediction of sets of layers in float, each given by the names of its layers."""

    evaluate: Callable[[tuple[str, ...]], float]
    """Quality drop, measured."""
    out_of_time: Callable[[], bool] = lambda: False
    """Checked before each evaluation."""
    predict: Callable[[tuple[str, ...]], float] | None = None
    """Noise, cheaply; default: the sum over the other layers."""
    worthwhile: Callable[[tuple[str, ...]], bool] = lambda _: True
    """Returns by time and bytes whether the set could be better than a float model; others are not evaluated."""


@dataclass(slots=True)
class LayerSearchResult:
    """Best set, all evaluations in order, and the reason for the end of the search."""

    best: EvaluatedSet
    trials: list[EvaluatedSet] = field(default_factory=list)
    out_of_time: bool = False
    not_worthwhile: bool = False
    """True if it ended because more layers in float are not worthwhile."""


def search_layers_of(noise: SensitivityReport) -> list[SearchLayer]:
    """Return the layers for the search, each under a unique name."""
    entries = [(entry, entry.layer) for entry in noise.layers]
    paths = Counter(layer.path for _, layer in entries)
    return [
        SearchLayer(_name(layer, [other for _, other in entries], paths), layer.path, layer.weight_bytes, entry.power)
        for entry, layer in entries
    ]


def _name(layer: OnnxLayer, others: Sequence[OnnxLayer], paths: Counter[str]) -> str:
    """Return a layer's path, or its node's name where the path is ambiguous."""
    plain = not set(layer.path) & set("*?[")
    alone = paths[layer.path] == 1 and not any(
        matches(layer.path, other.path) for other in others if other is not layer
    )
    return layer.path if plain and alone else layer.node


def costs(layers: Sequence[SearchLayer]) -> dict[str, float]:
    """Return the cost of each layer in float: its share of the bytes, and one more pair of conversions."""
    whole = sum(layer.size_bytes for layer in layers) or 1
    return {layer.name: layer.size_bytes / whole + 1 / len(layers) for layer in layers}


def ranked(layers: Sequence[SearchLayer]) -> list[SearchLayer]:
    """Sort the layers by noise over cost, largest first."""
    cost = costs(layers)
    return sorted(layers, key=lambda layer: -layer.noise / cost[layer.name])


def search(
    layers: Sequence[SearchLayer],
    drop: float,
    guard: float,
    sets: LayerSets,
    holds: Callable[[float, float], bool] = lambda drop, guard: drop <= guard,
) -> LayerSearchResult:
    """Find few layers to keep in float so that the guard passes. The best set so far is always kept.

    Args:
        layers: the quantized layers; at least one stays quantized.
        drop: of the model with all of them quantized, which is above the guard.
        guard: the largest drop that is allowed.
        sets: evaluation and prediction of sets of layers.
        holds: returns whether a drop is within a guard.
    """
    found = LayerSearchResult(EvaluatedSet((), drop))
    order = ranked(layers)
    noise = sets.predict or (lambda kept: sum(layer.noise for layer in order if layer.name not in kept))
    cost = costs(order) if order else {}

    def evaluated(kept: Sequence[SearchLayer]) -> bool | None:
        """Evaluate a set and return whether it passes the guard; None when out of time."""
        if sets.out_of_time():
            found.out_of_time = True
            return None
        trial = EvaluatedSet(_names(kept), sets.evaluate(_names(kept)))
        found.trials.append(trial)
        if is_better(trial, found.best, guard, holds, cost):
            found.best = trial
        return holds(trial.drop, guard)

    most = _longest_worthwhile(order, sets.worthwhile)
    if most < len(order) - 1:
        found.not_worthwhile = True
    count = _shortest_head(order, first_guess(order, drop, guard, noise), evaluated, most)
    if count is None:
        return found
    found.not_worthwhile = False
    head = order[:count]
    failing = [noise(trial.kept) for trial in found.trials if not holds(trial.drop, guard)]
    failing_noise = min(failing, default=noise(()))
    smaller = _drop_unneeded(head, cost, noise, math.sqrt(noise(_names(head)) * failing_noise), sets.out_of_time)

    def unlikely(kept: Sequence[SearchLayer]) -> bool:
        return noise(_names(kept)) >= failing_noise

    _requantize(smaller, head, cost, evaluated, unlikely)
    return found


def _longest_worthwhile(order: Sequence[SearchLayer], worthwhile: Callable[[tuple[str, ...]], bool]) -> int:
    """Return the length of the longest worthwhile head of the ranking; at least one layer stays quantized."""
    low, high = 0, len(order) - 1
    while low < high:  # worthwhile falls with the length of the head
        middle = (low + high + 1) // 2
        low, high = (middle, high) if worthwhile(_names(order[:middle])) else (low, middle - 1)
    return max(low, 0)


def _shortest_head(
    order: Sequence[SearchLayer], guess: int, evaluated: Callable[[Sequence[SearchLayer]], bool | None], most: int
) -> int | None:
    """Return the length of the shortest head that passes, by the evaluated heads; None if none does or time is out.

    A head of no layer is known to fail.
    """
    if most < 1:
        return None
    count, failing, step = min(guess, most), 0, 1
    held = evaluated(order[:count])
    while held and count > 1:  # shorter, until it fails
        shorter = max(1, count - step)
        held, step = evaluated(order[:shorter]), 2 * step
        if held:
            count = shorter
        else:
            failing = shorter
    if held is False and not failing:  # longer, until it holds
        failing, step = count, 1
        while not held and failing < most:
            count = min(failing + step, most)
            held, step = evaluated(order[:count]), 2 * step
            if held is None:
                return None
            failing = failing if held else count
        if not held:
            return None
    while held is not None and count - failing > 1:
        middle = (failing + count) // 2
        held = evaluated(order[:middle])
        failing, count = (failing, middle) if held else (middle, count)
    return None if held is None else count


def _names(layers: Sequence[SearchLayer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _drop_unneeded(
    kept: Sequence[SearchLayer],
    cost: dict[str, float],
    noise: Callable[[tuple[str, ...]], float],
    limit: float,
    out_of_time: Callable[[], bool],
) -> list[SearchLayer]:
    """Remove layers, costliest first, as long as the predicted noise stays within a limit."""
    left = list(kept)
    for layer in sorted(kept, key=lambda layer: -cost[layer.name]):
        without = [other for other in left if other is not layer]
        if out_of_time():
            return list(kept)  # no time is left to evaluate a smaller set
        if without and noise(_names(without)) <= limit:
            left = without
    return left


def first_guess(
    order: Sequence[SearchLayer], drop: float, guard: float, noise: Callable[[tuple[str, ...]], float]
) -> int:
    """Estimate the number of ranked layers to keep in float, assuming drop proportional to noise; at least 1."""
    share = 1.0 if math.isinf(drop) or drop <= 0 else max(guard / drop, MIN_NOISE_SHARE)
    limit = share * noise(())
    low, high = 0, max(1, len(order))
    while high - low > 1:  # the longer the head, the less noise is left
        middle = (low + high) // 2
        low, high = (low, middle) if noise(_names(order[:middle])) <= limit else (middle, high)
    return high


def _requantize(
    smaller: Sequence[SearchLayer],
    kept: Sequence[SearchLayer],
    cost: dict[str, float],
    evaluated: Callable[[Sequence[SearchLayer]], bool | None],
    unlikely: Callable[[Sequence[SearchLayer]], bool],
) -> None:
    """Quantize layers again that the guard does not need in float.

    `kept` passes the guard, and its subset `smaller` may pass too. Of sets with as much predicted noise as one that
    failed only one is evaluated, since a prediction is not a measurement.
    """
    left, tries, tried_unlikely = list(kept), REQUANTIZE_EVALUATIONS, False
    if len(smaller) < len(kept):
        held, tries = evaluated(smaller), tries - 1
        if held is None:
            return
        left = list(smaller) if held else left
    # One by one; the last of the ranking is known to be needed.
    costly = sorted((layer for layer in left if layer is not kept[-1]), key=lambda layer: -cost[layer.name])
    for layer in costly:
        whole = sum(cost[other.name] for other in left)
        if not tries or len(left) == 1 or cost[layer.name] < MIN_REQUANTIZE_COST * whole:
            return
        without = [other for other in left if other is not layer]
        if unlikely(without):
            if tried_unlikely:
                continue
            tried_unlikely = True
        held, tries = evaluated(without), tries - 1
        if held is None:
            return
        if held:
            left = without


def is_better(
    trial: EvaluatedSet, best: EvaluatedSet, guard: float, holds: Callable[[float, float], bool], cost: dict[str, float]
) -> bool:
    """Compare two sets: passing the guard first, then lower cost, or a lower drop where neither passes."""
    here, there = holds(trial.drop, guard), holds(best.drop, guard)
    if here != there:
        return here
    if not here:
        return trial.drop < best.drop
    return sum(cost[name] for name in trial.kept) < sum(cost[name] for name in best.kept)
