"""Which candidate is preferred: by speed, by size, or by their product. Never by what the evaluation data says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.errors import TechniqueError
from omgoptim.operations.screening import Attempt, within, within_safely
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

    def size_ratio(self, attempt: Attempt) -> float:
        return self.baseline_bytes / (attempt.made.size_bytes or self.baseline_bytes or 1)

    def merit(self, attempt: Attempt) -> float:
        """What is to be large: the speedup, the size ratio, or their product."""
        return self.merit_of(attempt.speedup, self.size_ratio(attempt))

    def merit_of(self, speedup: float, size_ratio: float) -> float:
        if self.prefer == "size" or not self.speed_known:
            return size_ratio
        return speedup if self.prefer == "speed" else speedup * size_ratio

    def as_fast_as(self, one: Attempt, other: Attempt) -> bool:
        """Whether no difference in speed can be claimed: their intervals meet, or a single launch tells too little."""
        if not self.speed_known:
            return True
        a, b = (attempt.timing.speedup if attempt.timing else None for attempt in (one, other))
        if a is None or b is None or one.timing is None:
            return False
        if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
            return a.low <= b.high and b.low <= a.high
        return max(a.value, b.value) <= min(a.value, b.value) * as_fast(one.timing, self.load)

    def ranked(self, attempts: Sequence[Attempt]) -> list[Attempt]:
        """The attempts, the preferred one first. Of those that are equally fast the smaller one counts as better; of
        those of one size, where size decides, the faster one."""
        left, order = list(attempts), []
        while left:
            best = max(left, key=self.merit)
            level = [attempt for attempt in left if attempt is best or self._equal(attempt, best)]
            by_size = [a for a in level if self.size_ratio(a) * SMALLER >= max(map(self.size_ratio, level))]
            first = max(by_size, key=lambda attempt: (attempt.speedup, self.size_ratio(attempt)))
            order.append(first)
            left.remove(first)
        return order

    def _equal(self, attempt: Attempt, best: Attempt) -> bool:
        if self.prefer == "size" or not self.speed_known:
            return self.size_ratio(attempt) * SMALLER >= self.size_ratio(best)
        return self.as_fast_as(attempt, best)


def is_float(attempt: Attempt) -> bool:
    return attempt.made.option.scheme in FLOATS


def is_mixed(attempt: Attempt) -> bool:
    """Whether the guard's search kept layers of it in float."""
    return bool(attempt.made.option.note)


def alive(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Those that were timed and judged."""
    return [attempt for attempt in attempts if attempt.timing and attempt.drop is not None and attempt.error is None]


def dominated(attempt: Attempt, attempts: Sequence[Attempt], guard: float, preference: Preference) -> Attempt | None:
    """The float candidate that mixed precision is not worth its loss beside, if there is one."""
    if not is_mixed(attempt):
        return None
    rivals = [other for other in alive(attempts) if is_float(other) and not other.reference and within(other, guard)]
    best = max(rivals, key=preference.merit, default=None)
    if best is None or preference.merit(attempt) >= WORTH_MIXING * preference.merit(best):
        return None
    return best


def ordered(attempts: Sequence[Attempt], guard: float, preference: Preference) -> list[Attempt]:
    """Those that hold the guard on the selection samples, in the order in which they are delivered.

    The preferred one is first; but of the quantized ones that are better than every float one, those that hold the
    guard with a margin come before those that only just do. The first of these that holds the guard on the evaluation
    data is delivered, so the order must be known before that data is read.
    """
    usable = [a for a in alive(attempts) if not a.reference and within(a, guard)]
    usable = [a for a in usable if dominated(a, attempts, guard, preference) is None]
    ranks = preference.ranked(usable)
    floats = next((index for index, attempt in enumerate(ranks) if is_float(attempt)), len(ranks))
    head = sorted(ranks[:floats], key=lambda attempt: not within_safely(attempt, guard))
    return [*head, *ranks[floats:]]


def finalists(attempts: Sequence[Attempt], guard: float, preference: Preference) -> list[Attempt]:
    """What is measured in full: the few best that hold the guard on the selection samples, the fastest, the smallest,
    the best float one, and float32 on the engine of each; where none holds it, the one that comes closest.

    Raises:
        TechniqueError: no candidate could be measured.
    """
    for attempt in attempts:
        if attempt.error is not None:
            attempt.status, attempt.why = "failed", f"{attempt.error.what}: {attempt.error.why}".strip(": ")
    usable = [attempt for attempt in alive(attempts) if not attempt.reference]
    if not usable:
        reasons = "; ".join(f"{attempt.made.option.name}: {attempt.why}" for attempt in attempts if attempt.why)
        raise TechniqueError("no candidate could be measured", reasons)
    order = ordered(attempts, guard, preference)
    if order:
        best = preference.merit(order[0])
        near = [a for a in order if preference.merit(a) * NEAR_THE_BEST >= best][:FINALISTS]
        chosen = [order[0], *near, max(order, key=lambda a: a.speedup), max(order, key=preference.size_ratio)]
        chosen += [next((a for a in order if not is_float(a)), order[0])]
        chosen += [next((a for a in order if is_float(a)), order[0])]
        chosen = [attempt for attempt in order if attempt in chosen]
    else:
        chosen = [min(usable, key=lambda a: (bool(a.ruined), a.drop or 0.0, -preference.merit(a)))]
    engines = {attempt.made.option.runtime for attempt in chosen}
    plain = [a for a in attempts if a.made.option.scheme == "fp32" and a.made.option.runtime in engines]
    plain = [a for a in plain if a.made.folder and a.error is None]
    chosen += [attempt for attempt in plain if attempt not in chosen]
    for attempt in chosen:
        attempt.status = "finalist"
    for attempt in alive(attempts):
        if attempt not in chosen:
            attempt.why = attempt.why or _why_dropped(attempt, attempts, order, guard, preference)
    return chosen


def _why_dropped(
    attempt: Attempt, attempts: Sequence[Attempt], order: Sequence[Attempt], guard: float, preference: Preference
) -> str:
    if attempt.ruined:
        return f"output {', '.join(attempt.ruined)} was ruined on the selection samples"
    if not within(attempt, guard):
        return f"quality drop {attempt.drop:.4f} on the selection samples is above the guard {guard:g}"
    rival = dominated(attempt, attempts, guard, preference)
    if rival is not None:
        return f"{rival.made.option.name} is about as good ({preference.prefer}) and loses no more: not worth its loss"
    best = order[0] if order else attempt
    if not preference.speed_known:
        return f"{preference.size_ratio(attempt) / preference.size_ratio(best):.0%} of the size ratio of the best"
    words = {"balanced": "speed times size ratio", "speed": "speed", "size": "size ratio"}[preference.prefer]
    return f"{preference.merit(attempt) / preference.merit(best):.0%} of the {words} of the best in the screening"
