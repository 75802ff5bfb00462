"""The chain: a smaller model by pruning or distillation, as small as the guard allows, quantized at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from omgoptim.operations.goal import Goal
from omgoptim.operations.optimization.cost import StepTimes
from omgoptim.operations.optimization.level_speeds import FACTORIZED, LevelSpeeds
from omgoptim.operations.optimization.points import StepResult, product, speeds
from omgoptim.operations.optimization.steps import PlannedStep, Steps
from omgoptim.operations.quantization.selection import Preference

SHORT_EPOCHS = 1
"""Training epochs of a step that only compares levels."""

MOST_EPOCHS = 40
"""Most epochs of the full recovery."""

UNTRAINED_SHARE = 0.1
"""Share of the budget that measuring untrained levels may cost."""

LEVELS = 3
"""Most further levels that are tried by the route that won."""

SECOND_ROUTE_SHARE = 0.2
"""Share of the time left that a second route may cost before the better of the two is known."""

LEVELS_SHARE = 0.4
"""Share of the time left that further levels may cost."""

MARGIN = 1.3
"""Time kept for a step over what it is expected to take, while others are still tried."""

RECOVERY_SHARE = 0.6
"""Share of the time left that one full recovery may cost: a shallower level may have to follow."""

SHARE_OF_GUARD = 2.0
"""Drop after a short recovery, over the guard, up to which a level is worth a full recovery."""

ALONE, UNTRAINED, COMPARED, RECOVERED, QUANTIZED = (0.05, 0.2), (0.2, 0.25), (0.25, 0.45), (0.45, 0.7), (0.7, 0.82)
"""Fractions of the run between which the parts move its progress."""


@dataclass(frozen=True, slots=True)
class Route:
    """A way to a smaller model."""

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

RECOVERIES, NARROW = 4, 0.15
"""Most levels that are recovered in full, and the width of the bracket of levels that needs no further one."""

SMALLEST_GUARD = 0.002
"""The guard that a short recovery is compared with where none or less is allowed."""


def quantize_alone(steps: Steps) -> StepResult | None:
    """Quantize the original: the baseline that a chain must beat."""
    arguments = {
        "runtime": steps.request.runtime,
        "max_quality_drop": steps.request.max_quality_drop,
        "prefer": steps.request.prefer,
    }
    return steps.take(PlannedStep("quantize", "quantize", arguments, span=ALONE))


@dataclass(frozen=True, slots=True)
class StepChain:
    """Takes the steps of a chain: compares routes, finds the level, recovers it in full, factorizes, quantizes."""

    steps: Steps
    goal: Goal
    cost: StepTimes
    preference: Preference
    speeds: LevelSpeeds

    def build(self) -> None:
        """Take the steps."""
        steps, first = self.steps, self._first_level()
        begun: list[tuple[Route, StepResult]] = []
        for index, route in enumerate((PRUNE, DISTILL)):
            if (
                index
                and begun
                and self.cost.trained_s(steps.taken, SHORT_EPOCHS) > SECOND_ROUTE_SHARE * steps.seconds_left
            ):
                break  # the time is better spent on the route that is begun
            point = self._short(route, first, index)
            if point is not None:
                begun.append((route, point))
        if not begun:
            return
        route = _better(begun, steps)
        level = self._level(route, first)

        def recovered_within(level: float) -> StepResult | None:
            point = self._recovered(route, level)
            held = point and self._quantized_within(point, f"quantize after {_name(route, level)}", level)
            return point if held else None

        deepest = level and deepest_level(
            recovered_within, first=level, high=level, most=RECOVERIES, narrow=NARROW, between=self._between
        )
        if deepest:
            self._factorize(deepest[1], _name(route, deepest[0]))
            return
        guard = self.goal.max_quality_drop
        short = [point for point in steps.taken if point.verb == route.verb and point.cautious_drop <= guard]
        if short:  # no full recovery came to an end within the guard
            fastest = max(zip(speeds(short), short, strict=True), key=lambda pair: pair[0])[1]
            self._quantized_within(fastest, f"quantize after {fastest.name}", None)

    def compared(self) -> list[PlannedStep]:
        """Return the steps that are compared first; none where there is time for one alone."""
        steps, first = self.steps, self._first_level()
        if self.cost.trained_s(steps.taken, SHORT_EPOCHS) > SECOND_ROUTE_SHARE * steps.seconds_left:
            return []
        trained = _training(steps, SHORT_EPOCHS)
        return [
            PlannedStep(route.name, route.verb, self._arguments(route, first) | trained) for route in (PRUNE, DISTILL)
        ]

    def _first_level(self) -> float:
        """Return the level worth a training that is nearest to the usual one."""
        edges = self.speeds.edges(self.preference) or [FIRST_LEVEL]
        return min(edges, key=lambda level: abs(level - FIRST_LEVEL))

    def _between(self, low: float, high: float) -> float | None:
        return self.speeds.next_level(low, high, self.preference)

    def _level(self, route: Route, first: float) -> float | None:
        """Return the deepest level whose drop after a short recovery promises to end within the guard."""
        steps, cost = self.steps, self.cost
        limit = _limit(steps)
        kept_s = cost.trained_s(steps.taken, 2 * SHORT_EPOCHS) + cost.quantize_s(steps.taken)  # for one full recovery
        spare_s = min(LEVELS_SHARE * steps.seconds_left, steps.seconds_left - MARGIN * kept_s)
        affordable = max(0, int(spare_s / max(cost.trained_s(steps.taken, SHORT_EPOCHS), 0.01)))
        tried = {first}

        def result(level: float) -> StepResult | None:
            known = next((point for point in steps.taken if point.name == _name(route, level)), None)
            tried.add(level)
            point = known or self._short(route, level, len(tried))
            return point if point is not None and point.drop <= limit else None

        most = 1 + min(LEVELS, affordable)
        found = deepest_level(result, first=first, most=most, between=self._between)
        return None if found is None else found[0]

    def _short(self, route: Route, level: float, index: int) -> StepResult | None:
        """Take a step to a level with a short recovery, if there is time to quantize its result."""
        steps, cost = self.steps, self.cost
        start, end = COMPARED
        width = (end - start) / (LEVELS + 2)
        begin = min(start + index * width, end - width)
        arguments = self._arguments(route, level) | _training(steps, SHORT_EPOCHS)
        needed = cost.trained_s(steps.taken, SHORT_EPOCHS) + cost.quantize_s(steps.taken)
        span, expected = (begin, begin + width), self._expected(route, level)
        return steps.take(PlannedStep(_name(route, level), route.verb, arguments, None, span, expected, needed))

    def _recovered(self, route: Route, level: float) -> StepResult | None:
        """Recover a level for as many epochs as the time left allows, with what quantizing takes held back."""
        steps, cost = self.steps, self.cost
        after = cost.quantize_s(steps.taken)
        overhead = cost.trained_s(steps.taken, 0)
        epoch = cost.trained_s(steps.taken, 1) - overhead
        affordable = (RECOVERY_SHARE * (steps.seconds_left - after) - overhead) / max(epoch, 1e-3)
        epochs = int(min(MOST_EPOCHS, max(2 * SHORT_EPOCHS, affordable)))
        arguments = self._arguments(route, level) | _training(steps, epochs)
        name = f"{_name(route, level)}, {epochs} epochs"
        needed = overhead + epochs * epoch + after
        expected = self._expected(route, level)
        return steps.take(PlannedStep(name, route.verb, arguments, None, RECOVERED, expected, needed))

    def _factorize(self, point: StepResult, name: str) -> None:
        """Factorize a recovered network, train it and quantize that, where an untrained one was better for it."""
        steps, cost = self.steps, self.cost
        if not self.speeds.factorizing_pays(self.preference):
            return
        after, overhead = cost.quantize_s(steps.taken), cost.trained_s(steps.taken, 0)
        epoch = cost.trained_s(steps.taken, 1) - overhead
        affordable = (steps.seconds_left - after - overhead) / max(epoch, 1e-3)
        epochs = int(min(MOST_EPOCHS, max(2 * SHORT_EPOCHS, affordable)))
        method = {"method": "whitened", "target_compression": FACTORIZED}
        arguments = {"method": method, "max_quality_drop": 1.0} | _training(steps, epochs)
        name = f"factorize after {name}"
        needed = overhead + epochs * epoch + after
        factorized = steps.take(PlannedStep(name, "factorize", arguments, point, RECOVERED, None, needed))
        if factorized is not None:
            self._quantized_within(factorized, f"quantize after {name}", None)

    def _quantized_within(self, point: StepResult, name: str, level: float | None) -> bool:
        """Quantize a point within the rest of the guard; return whether the result is within it.

        Args:
            point: the float result to quantize.
            name: of the step.
            level: that was measured untrained; None where none was.
        """
        steps, guard = self.steps, self.goal.max_quality_drop
        left = min(1.0, guard - point.drop)
        quantized = None
        if left >= 0:
            alone = next((one for one in steps.taken if one.verb == "quantize" and one.parent is None), None)
            expected = None if level is None else self.speeds.expected_quantized(level)
            expected = expected or product(point.speedup, alone.speedup if alone else None)
            arguments = {"runtime": steps.request.runtime, "max_quality_drop": left, "prefer": steps.request.prefer}
            seconds = self.cost.quantize_s(steps.taken)
            quantized = steps.take(PlannedStep(name, "quantize", arguments, point, QUANTIZED, expected, seconds))
        made = [point, *([quantized, *steps.alternatives(quantized)] if quantized else [])]
        return any(one.cautious_drop <= guard for one in made)

    def _arguments(self, route: Route, level: float) -> dict[str, Any]:
        return route.arguments(level, self.speeds.round_to)

    def _expected(self, route: Route, level: float) -> float:
        """Return the speedup that an untrained network of the level has in torch, or else the ratio of the work."""
        return self.speeds.expected_eager(level) or route.work_ratio(level)


def _better(begun: Sequence[tuple[Route, StepResult]], steps: Steps) -> Route:
    """Return the route whose drop may be recovered, then the faster one; else the one that lost less."""
    limit = _limit(steps)
    known = speeds([point for _, point in begun])

    def merit(index: int) -> tuple[bool, float]:
        point = begun[index][1]
        return point.drop <= limit, known[index] if point.drop <= limit else -point.drop

    return begun[max(range(len(begun)), key=merit)][0]


def _limit(steps: Steps) -> float:
    return SHARE_OF_GUARD * max(steps.request.max_quality_drop, SMALLEST_GUARD)


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
