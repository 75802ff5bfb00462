"""The chain: a smaller model by pruning or distillation, as small as the guard allows, quantized at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from omgoptim.operations.goal import Goal
from omgoptim.operations.optimization.cost import StepTimes
from omgoptim.operations.optimization.level_speeds import FACTORIZED, LevelSpeeds
from omgoptim.operations.optimization.points import StepResult, chained_speedup, comparable_speeds
from omgoptim.operations.optimization.steps import PlannedStep, Steps
from omgoptim.operations.quantization.selection import Preference

SHORT_EPOCHS = 1
"""Training epochs of a step that only compares levels. Chosen: the least that shows which level recovers."""

MAX_EPOCHS = 40
"""Most epochs of the full recovery. Chosen: the budget ends most recoveries earlier."""

UNTRAINED_SHARE = 0.1
"""Share of the budget that measuring untrained levels may cost. Chosen: what it rules out saves whole trainings."""

FURTHER_LEVELS = 3
"""Most further levels that are tried by the route that won. Chosen: three bisections of the range from 0 to 0.9 leave
brackets of about 0.1."""

SECOND_ROUTE_SHARE = 0.2
"""Share of the time left that a second route may cost before the better of the two is known. Chosen: a budget that
cannot pay for it is better spent on one route."""

LEVELS_SHARE = 0.4
"""Share of the time left that further levels may cost. Chosen: the larger part stays for the full recovery."""

MARGIN = 1.3
"""Time kept for a step over what it is expected to take, while others are still tried. Chosen: times of steps vary by
tens of percent."""

RECOVERY_SHARE = 0.6
"""Share of the time left that one full recovery may cost: a shallower level may have to follow. Chosen."""

PROMISING_DROP_FACTOR = 2.0
"""Drop after a short recovery, over the guard, up to which a level is worth a full recovery. Chosen: longer training
recovers part of the drop, and a level that is tried in vain costs a full recovery."""

ORIGINAL_SPAN, UNTRAINED_SPAN, COMPARED_SPAN, RECOVERED_SPAN, QUANTIZED_SPAN = (
    (0.05, 0.2),
    (0.2, 0.25),
    (0.25, 0.45),
    (0.45, 0.7),
    (0.7, 0.82),
)
"""Fractions of the run between which the parts move its progress. Chosen: for display only."""


@dataclass(frozen=True, slots=True)
class Route:
    """Method that makes the model smaller, with its arguments by compression level."""

    name: str
    verb: str
    arguments: Callable[[float, int | None], dict[str, Any]]
    """Arguments of the verb at a compression level, 0..1, and a multiple of the widths."""
    work_ratio: Callable[[float], float]
    """Ratio of the work at a level, before / after."""


PRUNE = Route(
    "prune",
    "prune",
    lambda level, round_to: {
        "method": {"method": "structured", "pruning_ratio": level, "round_to": round_to},
        "max_quality_drop": 1.0,
    },
    lambda level: 1 / (1 - level) ** 2,
)
DISTILL = Route(
    "distill",
    "distill",
    lambda level, round_to: {
        "student": {"student": "narrow", "width": round(1 - level, 3), "round_to": round_to},
        "max_quality_drop": 1.0,
    },
    lambda level: 1 / (1 - level) ** 2,
)
FIRST_LEVEL = 0.5
"""Compression level to begin with. Chosen: the middle of the range, as bisection does."""

RECOVERIES, NARROW = 4, 0.15
"""Most levels that are recovered in full, and the width of the bracket of levels that needs no further one. Chosen:
each is the longest step of a run."""

MIN_GUARD = 0.002
"""The guard that a short recovery is compared with where none or less is allowed. Chosen: below the resolution of a
thousand samples."""


def quantize_original(steps: Steps) -> StepResult | None:
    """Quantize the original: the baseline that a chain must beat."""
    arguments = {
        "runtime": steps.request.runtime,
        "max_quality_drop": steps.request.max_quality_drop,
        "prefer": steps.request.prefer,
    }
    return steps.run(PlannedStep("quantize", "quantize", arguments, span=ORIGINAL_SPAN))


@dataclass(frozen=True, slots=True)
class StepChain:
    """Chain of steps: compare routes, find the compression level, recover it in full, factorize, quantize."""

    steps: Steps
    goal: Goal
    cost: StepTimes
    preference: Preference
    speeds: LevelSpeeds

    def build(self) -> None:
        """Run the steps."""
        steps, first = self.steps, self._first_level()
        compared: list[tuple[Route, StepResult]] = []
        for index, route in enumerate((PRUNE, DISTILL)):
            if (
                index
                and compared
                and self.cost.trained_s(steps.points, SHORT_EPOCHS) > SECOND_ROUTE_SHARE * steps.seconds_left
            ):
                break  # the time is better spent on the route that is begun
            point = self._short_recovery(route, first, index)
            if point is not None:
                compared.append((route, point))
        if not compared:
            return
        route = _better(compared, steps)
        level = self._deepest_promising_level(route, first)

        def recovered_within(level: float) -> StepResult | None:
            point = self._full_recovery(route, level)
            held = point and self._quantized_within(point, f"quantize after {_name(route, level)}", level)
            return point if held else None

        deepest = level and deepest_level(
            recovered_within, first=level, high=level, most=RECOVERIES, narrow=NARROW, between=self._between
        )
        if deepest:
            self._factorize(deepest[1], _name(route, deepest[0]))
            return
        guard = self.goal.max_quality_drop
        short = [point for point in steps.points if point.verb == route.verb and point.cautious_drop <= guard]
        if short:  # no full recovery came to an end within the guard
            fastest = max(zip(comparable_speeds(short), short, strict=True), key=lambda pair: pair[0])[1]
            self._quantized_within(fastest, f"quantize after {fastest.name}", None)

    def first_steps(self) -> list[PlannedStep]:
        """Return the steps that are compared first; none where there is time for only one."""
        steps, first = self.steps, self._first_level()
        if self.cost.trained_s(steps.points, SHORT_EPOCHS) > SECOND_ROUTE_SHARE * steps.seconds_left:
            return []
        trained = _training(steps, SHORT_EPOCHS)
        return [
            PlannedStep(route.name, route.verb, self._arguments(route, first) | trained) for route in (PRUNE, DISTILL)
        ]

    def _first_level(self) -> float:
        """Return the level worth a training that is nearest to the usual one."""
        worthwhile = self.speeds.worthwhile_levels(self.preference) or [FIRST_LEVEL]
        return min(worthwhile, key=lambda level: abs(level - FIRST_LEVEL))

    def _between(self, low: float, high: float) -> float | None:
        return self.speeds.next_level(low, high, self.preference)

    def _deepest_promising_level(self, route: Route, first: float) -> float | None:
        """Return the deepest level whose drop after a short recovery promises to end within the guard."""
        steps, cost = self.steps, self.cost
        limit = _limit(steps)
        kept_s = cost.trained_s(steps.points, 2 * SHORT_EPOCHS) + cost.quantize_s(steps.points)  # for one full recovery
        spare_s = min(LEVELS_SHARE * steps.seconds_left, steps.seconds_left - MARGIN * kept_s)
        affordable = max(0, int(spare_s / max(cost.trained_s(steps.points, SHORT_EPOCHS), 0.01)))
        tried = {first}

        def result(level: float) -> StepResult | None:
            known = next((point for point in steps.points if point.name == _name(route, level)), None)
            tried.add(level)
            point = known or self._short_recovery(route, level, len(tried))
            return point if point is not None and point.drop <= limit else None

        most = 1 + min(FURTHER_LEVELS, affordable)
        found = deepest_level(result, first=first, most=most, between=self._between)
        return None if found is None else found[0]

    def _short_recovery(self, route: Route, level: float, index: int) -> StepResult | None:
        """Run a step to a level with a short recovery, if there is time to quantize its result."""
        steps, cost = self.steps, self.cost
        start, end = COMPARED_SPAN
        width = (end - start) / (FURTHER_LEVELS + 2)
        begin = min(start + index * width, end - width)
        arguments = self._arguments(route, level) | _training(steps, SHORT_EPOCHS)
        needed = cost.trained_s(steps.points, SHORT_EPOCHS) + cost.quantize_s(steps.points)
        span, expected = (begin, begin + width), self._expected(route, level)
        return steps.run(PlannedStep(_name(route, level), route.verb, arguments, None, span, expected, needed))

    def _full_recovery(self, route: Route, level: float) -> StepResult | None:
        """Recover a level for as many epochs as the time left allows, with what quantizing takes held back."""
        steps, cost = self.steps, self.cost
        after = cost.quantize_s(steps.points)
        overhead = cost.trained_s(steps.points, 0)
        epoch = cost.trained_s(steps.points, 1) - overhead
        affordable = (RECOVERY_SHARE * (steps.seconds_left - after) - overhead) / max(epoch, 1e-3)
        epochs = int(min(MAX_EPOCHS, max(2 * SHORT_EPOCHS, affordable)))
        arguments = self._arguments(route, level) | _training(steps, epochs)
        name = f"{_name(route, level)}, {epochs} epochs"
        needed = overhead + epochs * epoch + after
        expected = self._expected(route, level)
        return steps.run(PlannedStep(name, route.verb, arguments, None, RECOVERED_SPAN, expected, needed))

    def _factorize(self, point: StepResult, name: str) -> None:
        """Factorize a recovered network, train it and quantize that, where an untrained one was better for it."""
        steps, cost = self.steps, self.cost
        if not self.speeds.is_factorizing_worthwhile(self.preference):
            return
        after, overhead = cost.quantize_s(steps.points), cost.trained_s(steps.points, 0)
        epoch = cost.trained_s(steps.points, 1) - overhead
        affordable = (steps.seconds_left - after - overhead) / max(epoch, 1e-3)
        epochs = int(min(MAX_EPOCHS, max(2 * SHORT_EPOCHS, affordable)))
        method = {"method": "whitened", "target_compression": FACTORIZED}
        arguments = {"method": method, "max_quality_drop": 1.0} | _training(steps, epochs)
        name = f"factorize after {name}"
        needed = overhead + epochs * epoch + after
        factorized = steps.run(PlannedStep(name, "factorize", arguments, point, RECOVERED_SPAN, None, needed))
        if factorized is not None:
            self._quantized_within(factorized, f"quantize after {name}", None)

    def _quantized_within(self, point: StepResult, name: str, level: float | None) -> bool:
        """Quantize a point within the rest of the guard; return whether the result is within it.

        `level` is the level that was measured untrained; None where none was.
        """
        steps, guard = self.steps, self.goal.max_quality_drop
        left = min(1.0, guard - point.drop)
        quantized = None
        if left >= 0:
            quantized_original = next(
                (one for one in steps.points if one.verb == "quantize" and one.parent is None), None
            )
            expected = None if level is None else self.speeds.expected_quantized(level)
            expected = expected or chained_speedup(
                point.speedup, quantized_original.speedup if quantized_original else None
            )
            arguments = {"runtime": steps.request.runtime, "max_quality_drop": left, "prefer": steps.request.prefer}
            seconds = self.cost.quantize_s(steps.points)
            quantized = steps.run(PlannedStep(name, "quantize", arguments, point, QUANTIZED_SPAN, expected, seconds))
        made = [point, *([quantized, *steps.alternatives(quantized)] if quantized else [])]
        return any(one.cautious_drop <= guard for one in made)

    def _arguments(self, route: Route, level: float) -> dict[str, Any]:
        return route.arguments(level, self.speeds.round_to)

    def _expected(self, route: Route, level: float) -> float:
        """Return the speedup that an untrained network of the level has in torch, or else the ratio of the work."""
        return self.speeds.expected_eager(level) or route.work_ratio(level)


def _better(compared: Sequence[tuple[Route, StepResult]], steps: Steps) -> Route:
    """Return the route whose drop may be recovered, then the faster one; else the one that lost less."""
    limit = _limit(steps)
    known = comparable_speeds([point for _, point in compared])

    def merit(index: int) -> tuple[bool, float]:
        point = compared[index][1]
        return point.drop <= limit, known[index] if point.drop <= limit else -point.drop

    return compared[max(range(len(compared)), key=merit)][0]


def _limit(steps: Steps) -> float:
    return PROMISING_DROP_FACTOR * max(steps.request.max_quality_drop, MIN_GUARD)


def _training(steps: Steps, epochs: int) -> dict[str, Any]:
    request = steps.request
    rate = {} if request.learning_rate is None else {"learning_rate": request.learning_rate}
    return {"epochs": epochs, "loss": request.loss} | rate


def _name(route: Route, level: float) -> str:
    return f"{route.name} {level:.0%}"


Found = TypeVar("Found")


def deepest_level(
    result: Callable[[float], Found | None],
    *,
    first: float,
    high: float = 0.9,
    most: int = 4,
    narrow: float = 0.08,
    between: Callable[[float, float], float | None] = lambda low, high: round((low + high) / 2, 3),
) -> tuple[float, Found] | None:
    """Bisect to the deepest level whose result is within the guard; return it with that result, or None.

    Args:
        result: does a level, 0..1, and returns what came of it; None where it failed or is not within the guard.
        first: the level to begin with, above 0, which holds.
        high: a level that fails, 0..1.
        most: attempts.
        narrow: width of the bracket that ends the search.
        between: the next level between the deepest that holds and the shallowest that does not; None ends the search.
    """
    best: tuple[float, Found] | None = None
    low, level = 0.0, first
    for _ in range(most):
        found = result(level)
        if found is not None:
            low, best = level, (level, found)
        else:
            high = level
        following = between(low, high) if high - low > narrow else None
        if following is None:
            break
        level = following
    return best
