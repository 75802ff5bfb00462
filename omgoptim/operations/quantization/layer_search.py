"""Which layers to keep in float so that a guard holds: the search itself, on numbers only.

Layers are ranked by the noise they are predicted to bring over what keeping them in float costs. The first guess is the
shortest head of that ranking that leaves as little noise as the guard asks for; from there the head grows or shrinks by
1, 2, 4, … layers until it holds or fails, and what lies between is halved. At last layers of it are given back: first
all at once those without which the predicted noise stays below that of sets that failed, then the costliest one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

GIVE_BACK = 3
"""Most evaluations that giving layers back may take."""

WORTH_GIVING_BACK = 0.1
"""Part of the kept layers' cost below which a layer is not worth an evaluation."""

LEAST_SHARE = 0.1
"""Part of the noise that the first guess leaves at least: a small guard would ask for all layers, and need not."""


@dataclass(frozen=True, slots=True)
class Keepable:
    """A layer that can be kept in float."""

    name: str
    """How `ignore` names it."""
    path: str
    size_bytes: int
    """Of its float weights."""
    noise: float
    """What it is predicted to bring: noise over signal at the output."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated set: names of the layers in float, and the quality drop; infinite if it could not be made."""

    kept: tuple[str, ...]
    drop: float


@dataclass(slots=True)
class Found:
    """The best set, everything that was evaluated in order, and whether time ended the search."""

    best: Trial
    trials: list[Trial] = field(default_factory=list)
    out_of_time: bool = False
    cannot_pay: bool = False
    """Whether it ended because more layers in float could not pay any more."""


def costs(layers: Sequence[Keepable]) -> dict[str, float]:
    """What keeping each layer in float costs: its share of the bytes, and one more island between conversions."""
    whole = sum(layer.size_bytes for layer in layers) or 1
    return {layer.name: layer.size_bytes / whole + 1 / len(layers) for layer in layers}


def ranked(layers: Sequence[Keepable]) -> list[Keepable]:
    """The layers, most noise for what it costs first."""
    cost = costs(layers)
    return sorted(layers, key=lambda layer: -layer.noise / cost[layer.name])


def search(
    layers: Sequence[Keepable],
    drop: float,
    guard: float,
    evaluate: Callable[[tuple[str, ...]], float],
    out_of_time: Callable[[], bool] = lambda: False,
    holds: Callable[[float, float], bool] = lambda drop, guard: drop <= guard,
    predict: Callable[[tuple[str, ...]], float] | None = None,
    pays: Callable[[tuple[str, ...]], bool] = lambda _: True,
) -> Found:
    """Find few layers that, kept in float, hold the guard. The best so far is always kept.

    Args:
        layers: those that are quantized now; one at least stays so.
        drop: of the model with all of them quantized, which is above the guard.
        evaluate: the drop with the layers of these names in float.
        out_of_time: asked before each evaluation.
        holds: whether a drop is within a guard.
        predict: the noise with the layers of these names in float, cheaply; default: the sum over the others.
        pays: whether the model with the layers of these names in float could still be better than a float one, by what
            each costs in time and bytes; a set that cannot is not evaluated.
    """
    found = Found(Trial((), drop))
    order = ranked(layers)
    noise = predict or (lambda kept: sum(layer.noise for layer in order if layer.name not in kept))
    cost = costs(order) if order else {}

    def tried(kept: Sequence[Keepable]) -> bool | None:
        """Whether these hold the guard; None once time is out."""
        if out_of_time():
            found.out_of_time = True
            return None
        trial = Trial(_names(kept), evaluate(_names(kept)))
        found.trials.append(trial)
        if _better(trial, found.best, guard, holds, cost):
            found.best = trial
        return holds(trial.drop, guard)

    most = _most_that_pay(order, pays)
    if most < len(order) - 1:
        found.cannot_pay = True
    count = _shortest(order, first_guess(order, drop, guard, noise), tried, most)
    if count is None:
        return found
    found.cannot_pay = False
    head = order[:count]
    loud = min([noise(trial.kept) for trial in found.trials if not holds(trial.drop, guard)], default=noise(()))
    sparing = _without_spare(head, cost, noise, math.sqrt(noise(_names(head)) * loud), out_of_time)

    def hopeless(kept: Sequence[Keepable]) -> bool:
        return noise(_names(kept)) >= loud

    _give_back(sparing, head, cost, tried, hopeless)
    return found


def _most_that_pay(order: Sequence[Keepable], pays: Callable[[tuple[str, ...]], bool]) -> int:
    """Length of the longest head of the ranking that could pay; one layer at least stays quantized."""
    low, high = 0, len(order) - 1
    while low < high:  # the longer the head, the less it pays
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pays(_names(order[:middle])) else (low, middle - 1)
    return max(low, 0)


def _shortest(
    order: Sequence[Keepable], guess: int, tried: Callable[[Sequence[Keepable]], bool | None], most: int
) -> int | None:
    """Length of the shortest head of the ranking that holds, as far as heads that were tried tell; None if none of at
    most `most` layers holds, or if time ran out. A head of no layer is known to fail."""
    if most < 1:
        return None
    count, failing, step = min(guess, most), 0, 1
    held = tried(order[:count])
    while held and count > 1:  # shorter, until it fails
        shorter = max(1, count - step)
        held, step = tried(order[:shorter]), 2 * step
        if held:
            count = shorter
        else:
            failing = shorter
    if held is False and not failing:  # longer, until it holds
        failing, step = count, 1
        while not held and failing < most:
            count = min(failing + step, most)
            held, step = tried(order[:count]), 2 * step
            if held is None:
                return None
            failing = failing if held else count
        if not held:
            return None
    while held is not None and count - failing > 1:
        middle = (failing + count) // 2
        held = tried(order[:middle])
        failing, count = (failing, middle) if held else (middle, count)
    return None if held is None else count


def _names(layers: Sequence[Keepable]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _without_spare(
    kept: Sequence[Keepable],
    cost: dict[str, float],
    noise: Callable[[tuple[str, ...]], float],
    limit: float,
    out_of_time: Callable[[], bool],
) -> list[Keepable]:
    """The layers less those, the costliest first, without which the predicted noise stays within a limit."""
    left = list(kept)
    for layer in sorted(kept, key=lambda layer: -cost[layer.name]):
        without = [other for other in left if other is not layer]
        if out_of_time():
            return list(kept)  # a part that cannot be tried any more is no answer
        if without and noise(_names(without)) <= limit:
            left = without
    return left


def first_guess(order: Sequence[Keepable], drop: float, guard: float, noise: Callable[[tuple[str, ...]], float]) -> int:
    """How many of the ranked layers must go to float, if the drop goes as the noise does. At least one."""
    share = 1.0 if math.isinf(drop) or drop <= 0 else max(guard / drop, LEAST_SHARE)
    limit = share * noise(())
    low, high = 0, max(1, len(order))
    while high - low > 1:  # the longer the head, the less noise is left
        middle = (low + high) // 2
        low, high = (low, middle) if noise(_names(order[:middle])) <= limit else (middle, high)
    return high


def _give_back(
    sparing: Sequence[Keepable],
    kept: Sequence[Keepable],
    cost: dict[str, float],
    tried: Callable[[Sequence[Keepable]], bool | None],
    hopeless: Callable[[Sequence[Keepable]], bool],
) -> None:
    """Quantize again what turns out to be unnecessary: `kept` holds, `sparing` is the part of it that may do. Of sets
    with as much predicted noise as one that failed only one is tried: a prediction is no measurement."""
    left, tries, doubted = list(kept), GIVE_BACK, False
    if len(sparing) < len(kept):
        held, tries = tried(sparing), tries - 1
        if held is None:
            return
        left = list(sparing) if held else left
    # One by one; the last of the ranking is known to be needed.
    costly = sorted((layer for layer in left if layer is not kept[-1]), key=lambda layer: -cost[layer.name])
    for layer in costly:
        whole = sum(cost[other.name] for other in left)
        if not tries or len(left) == 1 or cost[layer.name] < WORTH_GIVING_BACK * whole:
            return
        without = [other for other in left if other is not layer]
        if hopeless(without):
            if doubted:
                continue
            doubted = True
        held, tries = tried(without), tries - 1
        if held is None:
            return
        if held:
            left = without


def _better(
    trial: Trial, best: Trial, guard: float, holds: Callable[[float, float], bool], cost: dict[str, float]
) -> bool:
    """Holding the guard comes first; then what costs less, or, where neither holds, what loses less."""
    here, there = holds(trial.drop, guard), holds(best.drop, guard)
    if here != there:
        return here
    if not here:
        return trial.drop < best.drop
    return sum(cost[name] for name in trial.kept) < sum(cost[name] for name in best.kept)
