"""The chain: a smaller model by pruning or distillation, as small as the guard allows, quantized at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omgoptim.operations.optimization.goal import Goal
from omgoptim.operations.optimization.levels import deepest_level
from omgoptim.operations.optimization.steps import Point, Steps

SHORT_EPOCHS = 1
"""Training epochs of a step that only compares levels."""

MOST_EPOCHS = 40
"""Most epochs of the full recovery."""

LEVELS = 3
"""Most further levels that are tried by the route that won."""

DUEL_SHARE = 0.2
"""Share of the time left that a second route may cost before the better of the two is known."""

SHARE_OF_GUARD = 2.0
"""Drop after a short recovery, over the guard, up to which a level is worth a full recovery."""

SINGLES, COMPARED, RECOVERED, QUANTIZED = (0.05, 0.2), (0.2, 0.45), (0.45, 0.7), (0.7, 0.82)
"""Fractions of the run between which the parts move its progress."""


@dataclass(frozen=True, slots=True)
class Route:
    """A way to a smaller model."""

    name: str
    verb: str
    arguments: Callable[[float], dict[str, Any]]
    """What the verb is asked for at a level, 0..1: the larger, the smaller the model."""
    speedup: Callable[[float], float]
    """What is expected of a level: work before over after."""


PRUNE = Route(
    "prune",
    "prune",
    lambda level: {"method": "structured", "pruning_ratio": level, "max_quality_drop": 1.0},
    lambda level: 1 / (1 - level) ** 2,
)
DISTILL = Route(
    "distill",
    "distill",
    lambda level: {"student": {"student": "narrow", "width": round(1 - level, 3)}, "max_quality_drop": 1.0},
    lambda level: 1 / (1 - level) ** 2,
)
FIRST_LEVEL = 0.5


def single(steps: Steps) -> Point | None:
    """Quantize the original: the baseline that a chain must beat."""
    arguments = {
        "runtime": steps.request.runtime,
        "max_quality_drop": steps.request.max_quality_drop,
        "prefer": steps.request.prefer,
    }
    return steps.take("quantize", "quantize", arguments, None, SINGLES)


def build_chain(steps: Steps, goal: Goal, has_train: bool) -> list[Point]:
    """Return what the chain made: the recovered model and its quantized form; empty where nothing is within the guard.

    Args:
        has_train: whether there is a train split; nothing is pruned or distilled without one.
    """
    if not has_train:
        return []
    begun = []
    for index, route in enumerate((PRUNE, DISTILL)):
        slowest = max((point.seconds for point in steps.taken if point.parent is None), default=0.0)
        if index and DUEL_SHARE * steps.seconds_left < slowest:
            break  # the time is better spent on the route that is begun
        point = _short(steps, route, FIRST_LEVEL, index)
        if point is not None:
            begun.append((route, point))
    if not begun:
        return []
    route, _ = max(begun, key=lambda pair: _merit(pair[1], steps))
    level = _level(steps, route)
    while level is not None and steps.seconds_left > 0:
        made = _full(steps, route, level)
        if any(point.cautious_drop <= goal.max_quality_drop for point in made):
            return made
        level = round(level / 2, 3) if level > 0.15 else None
    return []


def _level(steps: Steps, route: Route) -> float | None:
    """Return the deepest level whose drop after a short recovery promises to end within the guard."""
    limit = SHARE_OF_GUARD * max(steps.request.max_quality_drop, 0.002)
    tried = {FIRST_LEVEL}

    def result(level: float) -> Point | None:
        known = next((point for point in steps.taken if point.name == _name(route, level)), None)
        if known is None and steps.seconds_left <= 0:
            return None
        tried.add(level)
        return known or _short(steps, route, level, len(tried))

    found = deepest_level(result, lambda point: point.drop <= limit, first=FIRST_LEVEL, most=LEVELS + 1)
    return None if found is None else found[0]


def _short(steps: Steps, route: Route, level: float, index: int) -> Point | None:
    """Take a step to a level with a short recovery."""
    start, end = COMPARED
    width = (end - start) / (LEVELS + 2)
    begin = min(start + index * width, end - width)
    arguments = route.arguments(level) | _training(steps, SHORT_EPOCHS)
    name = _name(route, level)
    return steps.take(name, route.verb, arguments, None, (begin, begin + width), route.speedup(level))


def _full(steps: Steps, route: Route, level: float) -> list[Point]:
    """Recover a level in full, and quantize it; the points made, the quantized ones first."""
    epochs = _epochs(steps)
    arguments = route.arguments(level) | _training(steps, epochs)
    name = f"{_name(route, level)}, {epochs} epochs"
    recovered = steps.take(name, route.verb, arguments, None, RECOVERED, route.speedup(level))
    if recovered is None:
        return []
    left = steps.request.max_quality_drop - recovered.drop
    if left < 0:
        return [recovered]
    single_step = next((point for point in steps.taken if point.verb == "quantize" and point.parent is None), None)
    expected = recovered.speedup * (single_step.speedup if single_step else 1.0)
    arguments = {"runtime": steps.request.runtime, "max_quality_drop": left, "prefer": steps.request.prefer}
    quantized = steps.take(
        f"quantize after {_name(route, level)}", "quantize", arguments, recovered, QUANTIZED, expected
    )
    if quantized is None:
        return [recovered]
    return [quantized, *steps.alternatives(quantized), recovered]


def _epochs(steps: Steps) -> int:
    """Return the epochs that the time left allows: half of it, by what an epoch took so far."""
    trained = [point.run.report.training for point in steps.taken if point.run.report.training]
    seconds = [training.seconds / max(len(training.epochs), 1) for training in trained if training.epochs]
    if not seconds:
        return 4 * SHORT_EPOCHS
    return int(min(MOST_EPOCHS, max(2 * SHORT_EPOCHS, 0.5 * steps.seconds_left / max(seconds))))


def _training(steps: Steps, epochs: int) -> dict[str, Any]:
    request = steps.request
    rate = {} if request.learning_rate is None else {"learning_rate": request.learning_rate}
    return {"epochs": epochs, "loss": request.loss} | rate


def _name(route: Route, level: float) -> str:
    return f"{route.name} {level:.0%}"


def _merit(point: Point, steps: Steps) -> tuple[bool, float]:
    """What is to be large: a drop that may be recovered, then speedup over what was lost beyond the guard."""
    limit = SHARE_OF_GUARD * max(steps.request.max_quality_drop, 0.002)
    return point.drop <= limit, point.speedup if point.drop <= limit else -point.drop
