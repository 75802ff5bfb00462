"""The words of a report, chosen by its numbers: nothing here can say more than was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from omgoptim.measure.agreement import RUINED_AGREEMENT, RUINED_ERROR, OutputAgreement
from omgoptim.measure.quality import Quality
from omgoptim.operations.timing import BUSY, OVERLOADED
from omgoptim.reports import Gains, Measurement
from omgoptim.reports.measured import SMALLER

Outcome = Literal["ok", "no_gain", "guard_failed"]

ROUNDING = 1e-6
"""A drop this small is the arithmetic of another engine, and no loss: a guard of 0 passes the same float32 model."""


MARGIN_SHARE = 0.5
"""Largest part of the guard that is kept free for what the selection samples cannot tell."""

MOST_SAMPLES = 1_000_000
"""More evaluation samples than a request may ask for: no set decides what would need them."""


def speed_words(gains: Gains) -> str:
    """`2.31x faster (2.28 to 2.35)`, or that no difference can be claimed."""
    if gains.speedup is None:
        return "speed undecided: the machine was overloaded"
    if gains.speedup_low is None or gains.speedup_high is None:
        return (
            f"{gains.speedup:.2f}x the speed in a single launch (a point estimate; timing standard gives an interval)"
        )
    interval = f"({gains.speedup_low:.2f} to {gains.speedup_high:.2f}, 95 % over {gains.launches} launches)"
    if gains.speedup_low > 1:
        return f"{gains.speedup:.2f}x faster {interval}"
    if gains.speedup_high < 1:
        return f"slower: {gains.speedup:.2f}x the speed {interval}"
    return f"not measurably faster: {gains.speedup:.2f}x {interval}"


def size_words(gains: Gains) -> str:
    """`3.9x smaller on disk`, or that it is not."""
    ratio = gains.size_ratio
    if ratio is None:
        return "its size was not compared"
    if ratio >= SMALLER:
        return f"{ratio:.2f}x smaller on disk"
    return "about the same size on disk" if ratio > 1 / SMALLER else f"{1 / ratio:.2f}x larger on disk"


def quality_words(before: Measurement, quality: Quality | None) -> str:
    """Quality before and after, with the interval of the drop."""
    if quality is None:
        return "Quality was not measured."
    name = quality.metric.replace("_", " ")
    known = math.isfinite(quality.low)
    interval = f" (drop {quality.drop:+.4f}, 95 %: {quality.low:+.4f} to {quality.high:+.4f})" if known else ""
    return f"{name} {quality.before:.4f} -> {quality.after:.4f} on {before.samples} samples{interval}."


def is_gain(gains: Gains) -> bool:
    """Whether it became smaller or faster, by what was measured."""
    smaller = gains.size_ratio is not None and gains.size_ratio >= SMALLER
    low = gains.speedup_low if gains.speedup_low is not None else gains.speedup
    return smaller or (low is not None and low > 1)


def holds(drop: float, guard: float) -> bool:
    """Whether a drop in quality is within the guard."""
    return drop <= guard + ROUNDING


def passes(quality: Quality, guard: float) -> bool:
    """Whether a result holds the guard, and ruins no output that the metric never reads."""
    return holds(quality.drop, guard) and not quality.ruined


def with_margin(drop: float, high: float, guard: float) -> float:
    """A drop on selection samples as the search for a candidate judges it: the upper end of its 95 % interval.

    With few samples that end lies above any guard, so the margin is bounded by a share of the guard.
    """
    return drop + max(0.0, min(high - drop, MARGIN_SHARE * guard))


def decided(quality: Quality, guard: float) -> bool:
    """Whether the interval says on which side of the guard the drop is, by the same rounding as the verdict."""
    return holds(quality.high, guard) or not holds(quality.low, guard)


def samples_needed(quality: Quality, guard: float) -> int | None:
    """How many evaluation samples would likely decide, where these do not; None where no evaluation set could."""
    if decided(quality, guard) or abs(quality.drop - guard) <= ROUNDING:
        return None
    needed = quality.samples_to_decide(guard)
    return needed if needed is not None and needed <= MOST_SAMPLES else None


def outcome_of(gains: Gains, quality: Quality, guard: float) -> Outcome:
    """The one word a run ends with: the guard and the outputs first, then whether anything was gained."""
    if quality.ruined or not holds(quality.drop, guard):
        return "guard_failed"
    return "ok" if is_gain(gains) else "no_gain"


def verdict_words(outcome: Outcome, name: str, gains: Gains, quality: Quality, guard: float) -> str:
    """The first sentence of a summary, for the candidate `name`."""
    became = f"{size_words(gains)}, {speed_words(gains)}"
    if quality.ruined:
        return f"{ruined_words(quality.ruined)} {name} is {became}."
    if outcome == "guard_failed":
        return (
            f"The guard failed: {name} came closest and loses {quality.drop:.4f}, more than {guard:g}. It is {became}."
        )
    return f"{name}: {became}." if outcome == "ok" else f"No gain. The best candidate, {name}, is {became}."


def ruined_words(ruined: Sequence[OutputAgreement]) -> str:
    """Which outputs were ruined, each with its error, in one sentence."""
    told = []
    for output in ruined:
        if output.relative_error is not None:
            error = f"relative error {output.relative_error:.2f}, more than {RUINED_ERROR:g}"
        else:
            error = f"{output.agreement:.0%} as the original's, less than {RUINED_AGREEMENT:.0%}"
        told.append(f"'{output.spec.name}' ({error})")
    one = "Output" if len(told) == 1 else "Outputs"
    was = "was" if len(told) == 1 else "were"
    return f"{one} {', '.join(told)} {was} ruined; the metric does not read {'it' if len(told) == 1 else 'them'}."


def quality_warnings(quality: Quality | None, guard: float, real_data: bool, labelled: bool = False) -> list[str]:
    """Return what must be said beside the quality.

    Args:
        labelled: whether the evaluation data has targets, which a metric of agreement does not read.
    """
    if quality is None:
        return []
    warnings = []
    if not real_data:
        warnings.append(
            f"{quality.metric} was measured on random inputs: it is no accuracy. Give data to measure accuracy."
        )
    elif quality.is_agreement:
        why = "it does not read the data's targets" if labelled else "the data has no targets"
        warnings.append(f"{quality.metric} is agreement with the original model, not accuracy: {why}")
    if not math.isfinite(quality.high - quality.low):
        warnings.append(
            f"the drop of {quality.metric} has no interval: too few samples, samples that cannot be drawn one by one, "
            "a metric that takes too long to be computed again and again, or one that resamples never change"
        )
    elif not decided(quality, guard):
        needed = samples_needed(quality, guard)
        more = f"about {needed:,} samples would decide" if needed else "no evaluation set can decide this"
        warnings.append(
            f"{quality.samples} samples cannot decide whether the drop is within {guard:g} "
            f"(95 % interval {quality.low:+.4f} to {quality.high:+.4f}); {more}"
        )
    return warnings


def load_warnings(load: float | None) -> list[str]:
    """What must be said when others used the machine while it was timed."""
    if load is None or load <= BUSY:
        return []
    if load > OVERLOADED:
        return [
            f"other processes used {load:.0%} of the CPU: times of this run mean little, and their ratio is not given; "
            "wait until they are done, then measure again: `omgoptim compare` times what was made"
        ]
    return [f"other processes used {load:.0%} of the CPU: times are longer than on a quiet machine, the interval wider"]
