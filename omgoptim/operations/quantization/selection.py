"""Preference among candidates by speed, size or their product; never by the evaluation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.errors import TechniqueError
from omgoptim.models.manifest import Manifest
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.screening import CandidateResult, passes_guard, passes_guard_with_margin
from omgoptim.operations.timing import as_fast
from omgoptim.reports.measured import SMALLER
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Prefer

FLOATS = ("fp32", "bf16", "fp16")
"""Schemes without integer weights, chosen where integers lose too much quality."""

NEAR_BEST_FACTOR = 1.25
"""Factor within which a screened candidate may still be the best: latency varies by tens of percent between launches,
and screening uses one. Chosen for that scatter."""

FINALISTS = 2
"""Maximum number of candidates near the best that are measured in full: each takes several launches."""

MIXED_PRECISION_FACTOR = NEAR_BEST_FACTOR
"""Minimum advantage of mixed precision over float, which loses no quality: the scatter of screening."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Preference of the request, and the load of the machine."""

    prefer: Prefer
    baseline_bytes: int
    speed_known: bool = True
    """False on an overloaded machine: size alone decides then."""
    load: float = 0.0

    @staticmethod
    def of(request: QuantizeRequest, loaded: LoadedModel) -> Preference:
        """Return the preference of a request for candidates of a model."""
        return Preference(request.prefer, Manifest.read(loaded.baseline).size_bytes)

    def size_ratio(self, result: CandidateResult) -> float:
        """Return the original's bytes over the candidate's; 1 for one without an artifact."""
        return self.baseline_bytes / (result.built.size_bytes or self.baseline_bytes or 1)

    def merit(self, result: CandidateResult) -> float:
        """Return the value to maximize: speedup, size ratio, or their product."""
        return self.merit_of(result.speedup, self.size_ratio(result))

    def merit_of(self, speedup: float, size_ratio: float) -> float:
        """Return the value to maximize for a speedup and a size ratio."""
        if self.prefer == "size" or not self.speed_known:
            return size_ratio
        return speedup if self.prefer == "speed" else speedup * size_ratio

    def as_fast_as(self, one: CandidateResult, other: CandidateResult) -> bool:
        """Return whether speeds do not differ significantly: overlapping intervals, or near in a single launch."""
        if not self.speed_known:
            return True
        a, b = (result.timing.speedup if result.timing else None for result in (one, other))
        if a is None or b is None or one.timing is None:
            return False
        if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
            return a.low <= b.high and b.low <= a.high
        return max(a.value, b.value) <= min(a.value, b.value) * as_fast(one.timing, self.load)

    def ranked(self, results: Sequence[CandidateResult]) -> list[CandidateResult]:
        """Sort results by preference. Among equally fast ones the smaller is better; among equal sizes the faster."""
        left, order = list(results), []
        while left:
            best = max(left, key=self.merit)
            level = [result for result in left if result is best or self._equal(result, best)]
            by_size = [a for a in level if self.size_ratio(a) * SMALLER >= max(map(self.size_ratio, level))]
            first = max(by_size, key=lambda result: (result.speedup, self.size_ratio(result)))
            order.append(first)
            left.remove(first)
        return order

    def _equal(self, result: CandidateResult, best: CandidateResult) -> bool:
        if self.prefer == "size" or not self.speed_known:
            return self.size_ratio(result) * SMALLER >= self.size_ratio(best)
        return self.as_fast_as(result, best)


def is_float(result: CandidateResult) -> bool:
    """Return whether the candidate's scheme is a floating-point format."""
    return result.built.spec.scheme in FLOATS


def is_mixed(result: CandidateResult) -> bool:
    """Return whether the result is from a mixed precision search."""
    return result.built.spec.float_layers > 0


def with_timing_and_quality(results: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Return the results with timing and quality."""
    return [result for result in results if result.timing and result.drop is not None and result.error is None]


def dominated_by(
    result: CandidateResult, results: Sequence[CandidateResult], guard: float, preference: Preference
) -> CandidateResult | None:
    """Return the float candidate that makes a mixed precision one not worth its loss, if any."""
    if not is_mixed(result):
        return None
    rivals = [
        other
        for other in with_timing_and_quality(results)
        if is_float(other) and not other.reference and passes_guard(other, guard)
    ]
    best = max(rivals, key=preference.merit, default=None)
    if best is None or preference.merit(result) >= MIXED_PRECISION_FACTOR * preference.merit(best):
        return None
    return best


def order_candidates(results: Sequence[CandidateResult], guard: float, preference: Preference) -> list[CandidateResult]:
    """Order the candidates that pass the guard on the selection samples by preference.

    Of the quantized candidates better than every float one, those that pass the guard with a margin come first. The
    first in this order that passes the guard on the evaluation data is chosen, so the order is fixed before that data
    is read.
    """
    usable = [a for a in with_timing_and_quality(results) if not a.reference and passes_guard(a, guard)]
    usable = [a for a in usable if dominated_by(a, results, guard, preference) is None]
    ranks = preference.ranked(usable)
    floats = next((index for index, result in enumerate(ranks) if is_float(result)), len(ranks))
    head = sorted(ranks[:floats], key=lambda result: not passes_guard_with_margin(result, guard))
    return [*head, *ranks[floats:]]


def select_finalists(results: Sequence[CandidateResult], guard: float, preference: Preference) -> list[CandidateResult]:
    """Select the candidates for full measurement.

    These are the few best that pass the guard on the selection samples, the fastest, the smallest, the best float one,
    and float32 on the engine of each; where none passes, the closest one.

    Raises:
        TechniqueError: no candidate could be measured.
    """
    for result in results:
        if result.error is not None:
            result.status, result.why = "failed", result.error.reason
    usable = [result for result in with_timing_and_quality(results) if not result.reference]
    if not usable:
        reasons = "; ".join(f"{result.name}: {result.why}" for result in results if result.why)
        raise TechniqueError("no candidate could be measured", reasons)
    order = order_candidates(results, guard, preference)
    if order:
        best = preference.merit(order[0])
        near = [a for a in order if preference.merit(a) * NEAR_BEST_FACTOR >= best][:FINALISTS]
        chosen = [order[0], *near, max(order, key=lambda a: a.speedup), max(order, key=preference.size_ratio)]
        chosen += [next((a for a in order if not is_float(a)), order[0])]
        chosen += [next((a for a in order if is_float(a)), order[0])]
        chosen = [result for result in order if result in chosen]
    else:
        chosen = [min(usable, key=lambda a: (bool(a.ruined), a.drop or 0.0, -preference.merit(a)))]
    engines = {result.built.spec.runtime for result in chosen}
    plain = [a for a in results if a.built.spec.scheme == "fp32" and a.built.spec.runtime in engines]
    plain = [a for a in plain if a.built.folder and a.error is None]
    chosen += [result for result in plain if result not in chosen]
    for result in chosen:
        result.status = "finalist"
    for result in with_timing_and_quality(results):
        if result not in chosen:
            result.why = result.why or _why_dropped(result, results, order, guard, preference)
    return chosen


def _why_dropped(
    result: CandidateResult,
    results: Sequence[CandidateResult],
    order: Sequence[CandidateResult],
    guard: float,
    preference: Preference,
) -> str:
    if result.ruined:
        return f"output {', '.join(result.ruined)} was ruined on the selection samples"
    if not passes_guard(result, guard):
        return f"quality drop {result.drop:.4f} on the selection samples is above the guard {guard:g}"
    rival = dominated_by(result, results, guard, preference)
    if rival is not None:
        return f"{rival.built.spec.name} is about as good (by {preference.prefer}) without the quality drop"
    best = order[0] if order else result
    if not preference.speed_known:
        return (
            f"{preference.size_ratio(result) / preference.size_ratio(best):.0%} of the size ratio of the best candidate"
        )
    criterion = {"balanced": "speed times size ratio", "speed": "speed", "size": "size ratio"}[preference.prefer]
    return (
        f"{preference.merit(result) / preference.merit(best):.0%} of the {criterion} of the best candidate in screening"
    )
