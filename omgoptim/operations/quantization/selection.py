"""Which candidate is preferred: by speed, by size, or by their product. Never by what the evaluation data says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.errors import TechniqueError
from omgoptim.operations.quantization.screening import CandidateResult, within, within_safely
from omgoptim.operations.timing import as_fast
from omgoptim.reports.measured import SMALLER
from omgoptim.requests.quantize import Prefer

FLOATS = ("fp32", "bf16", "fp16")
"""Schemes without integers: what is delivered where integers lose too much."""

NEAR_THE_BEST = 1.25
"""A candidate screened within this factor of the best may still be the best: screening is one launch."""

FINALISTS = 2
"""Most candidates that are measured in full for being near the best."""

WORTH_MIXING = 1.25
"""How much better than float, which loses nothing, mixed precision must be to be delivered."""


@dataclass(frozen=True, slots=True)
class Preference:
    """What the request prefers, and what is known of the machine."""

    prefer: Prefer
    baseline_bytes: int
    speed_known: bool = True
    """False on an overloaded machine: then size decides alone."""
    load: float = 0.0

    def size_ratio(self, result: CandidateResult) -> float:
        return self.baseline_bytes / (result.made.size_bytes or self.baseline_bytes or 1)

    def merit(self, result: CandidateResult) -> float:
        """What is to be large: the speedup, the size ratio, or their product."""
        return self.merit_of(result.speedup, self.size_ratio(result))

    def merit_of(self, speedup: float, size_ratio: float) -> float:
        if self.prefer == "size" or not self.speed_known:
            return size_ratio
        return speedup if self.prefer == "speed" else speedup * size_ratio

    def as_fast_as(self, one: CandidateResult, other: CandidateResult) -> bool:
        """Whether no difference in speed can be claimed: their intervals meet, or a single launch tells too little."""
        if not self.speed_known:
            return True
        a, b = (result.timing.speedup if result.timing else None for result in (one, other))
        if a is None or b is None or one.timing is None:
            return False
        if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
            return a.low <= b.high and b.low <= a.high
        return max(a.value, b.value) <= min(a.value, b.value) * as_fast(one.timing, self.load)

    def ranked(self, results: Sequence[CandidateResult]) -> list[CandidateResult]:
        """The attempts, the preferred one first. Of those that are equally fast the smaller one counts as better; of
        those of one size, where size decides, the faster one."""
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
    return result.made.option.scheme in FLOATS


def is_mixed(result: CandidateResult) -> bool:
    """Whether the guard's search kept layers of it in float."""
    return bool(result.made.option.note)


def alive(results: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Those that were timed and judged."""
    return [result for result in results if result.timing and result.drop is not None and result.error is None]


def dominated(
    result: CandidateResult, results: Sequence[CandidateResult], guard: float, preference: Preference
) -> CandidateResult | None:
    """The float candidate that mixed precision is not worth its loss beside, if there is one."""
    if not is_mixed(result):
        return None
    rivals = [other for other in alive(results) if is_float(other) and not other.reference and within(other, guard)]
    best = max(rivals, key=preference.merit, default=None)
    if best is None or preference.merit(result) >= WORTH_MIXING * preference.merit(best):
        return None
    return best


def ordered(results: Sequence[CandidateResult], guard: float, preference: Preference) -> list[CandidateResult]:
    """Those that hold the guard on the selection samples, in the order in which they are delivered.

    The preferred one is first; but of the quantized ones that are better than every float one, those that hold the
    guard with a margin come before those that only just do. The first of these that holds the guard on the evaluation
    data is delivered, so the order must be known before that data is read.
    """
    usable = [a for a in alive(results) if not a.reference and within(a, guard)]
    usable = [a for a in usable if dominated(a, results, guard, preference) is None]
    ranks = preference.ranked(usable)
    floats = next((index for index, result in enumerate(ranks) if is_float(result)), len(ranks))
    head = sorted(ranks[:floats], key=lambda result: not within_safely(result, guard))
    return [*head, *ranks[floats:]]


def finalists(results: Sequence[CandidateResult], guard: float, preference: Preference) -> list[CandidateResult]:
    """What is measured in full: the few best that hold the guard on the selection samples, the fastest, the smallest,
    the best float one, and float32 on the engine of each; where none holds it, the one that comes closest.

    Raises:
        TechniqueError: no candidate could be measured.
    """
    for result in results:
        if result.error is not None:
            result.status, result.why = "failed", f"{result.error.what}: {result.error.why}".strip(": ")
    usable = [result for result in alive(results) if not result.reference]
    if not usable:
        reasons = "; ".join(f"{result.made.option.name}: {result.why}" for result in results if result.why)
        raise TechniqueError("no candidate could be measured", reasons)
    order = ordered(results, guard, preference)
    if order:
        best = preference.merit(order[0])
        near = [a for a in order if preference.merit(a) * NEAR_THE_BEST >= best][:FINALISTS]
        chosen = [order[0], *near, max(order, key=lambda a: a.speedup), max(order, key=preference.size_ratio)]
        chosen += [next((a for a in order if not is_float(a)), order[0])]
        chosen += [next((a for a in order if is_float(a)), order[0])]
        chosen = [result for result in order if result in chosen]
    else:
        chosen = [min(usable, key=lambda a: (bool(a.ruined), a.drop or 0.0, -preference.merit(a)))]
    engines = {result.made.option.runtime for result in chosen}
    plain = [a for a in results if a.made.option.scheme == "fp32" and a.made.option.runtime in engines]
    plain = [a for a in plain if a.made.folder and a.error is None]
    chosen += [result for result in plain if result not in chosen]
    for result in chosen:
        result.status = "finalist"
    for result in alive(results):
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
    if not within(result, guard):
        return f"quality drop {result.drop:.4f} on the selection samples is above the guard {guard:g}"
    rival = dominated(result, results, guard, preference)
    if rival is not None:
        return f"{rival.made.option.name} is about as good ({preference.prefer}) and loses no more: not worth its loss"
    best = order[0] if order else result
    if not preference.speed_known:
        return f"{preference.size_ratio(result) / preference.size_ratio(best):.0%} of the size ratio of the best"
    words = {"balanced": "speed times size ratio", "speed": "speed", "size": "size ratio"}[preference.prefer]
    return f"{preference.merit(result) / preference.merit(best):.0%} of the {words} of the best in the screening"
