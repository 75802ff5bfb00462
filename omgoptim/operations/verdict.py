"""Verdict and sentences of a report, derived from its measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from omgoptim.measure.agreement import RUINED_AGREEMENT, RUINED_ERROR, RUINED_PART, OutputAgreement
from omgoptim.measure.quality import Quality
from omgoptim.operations.timing import AS_FAST_ONCE, BUSY, OVERLOADED
from omgoptim.reports import Gains, Measurement
from omgoptim.reports.measured import SMALLER

Outcome = Literal["ok", "no_gain", "guard_failed"]

ROUNDING = 1e-6
"""Quality drop that counts as rounding of another engine: a guard of 0 passes the same float32 model. Chosen: less than
one of the largest number of evaluation samples that may be asked for."""

MARGIN_SHARE = 0.5
"""Maximum margin for the uncertainty of selection samples, as a fraction of the guard: with a few hundred samples the
interval is wider than any guard, and no candidate would pass. Chosen: half."""

MAX_CLASSES = 3
"""Classes that are named as lost. Chosen: a warning stays one line each."""

MAX_SAMPLES = 1_000_000
"""Largest number of evaluation samples that a request may ask for. The bound of `samples` in requests/base.py."""


def speed_phrase(gains: Gains) -> str:
    """Return `2.31x faster (2.28 to 2.35 …)`, or that the difference is not significant."""
    if gains.speedup is None:
        return "speed undecided: the machine was overloaded"
    if gains.speedup_low is None or gains.speedup_high is None:
        return f"{gains.speedup:.2f}x speed in a single launch (point estimate; timing standard gives an interval)"
    interval = f"({gains.speedup_low:.2f} to {gains.speedup_high:.2f}, 95 % over {gains.launches} launches)"
    if gains.speedup_low > 1:
        return f"{gains.speedup:.2f}x faster {interval}"
    if gains.speedup_high < 1:
        return f"slower: {gains.speedup:.2f}x speed {interval}"
    return f"no significant speedup: {gains.speedup:.2f}x {interval}"


def size_phrase(gains: Gains) -> str:
    """Return `3.9x smaller on disk`, or that it is not smaller."""
    ratio = gains.size_ratio
    if ratio is None:
        return "size not compared"
    if ratio >= SMALLER:
        return f"{ratio:.2f}x smaller on disk"
    return "about the same size on disk" if ratio > 1 / SMALLER else f"{1 / ratio:.2f}x larger on disk"


def quality_sentence(before: Measurement, quality: Quality | None) -> str:
    """Return a sentence with quality before and after and the interval of the drop."""
    if quality is None:
        return "Quality was not measured."
    name = quality.metric.replace("_", " ")
    known = math.isfinite(quality.low)
    interval = f" (drop {quality.drop:+.4f}, 95 %: {quality.low:+.4f} to {quality.high:+.4f})" if known else ""
    return f"{name} {quality.before:.4f} -> {quality.after:.4f} on {before.samples} samples{interval}."


def is_gain(gains: Gains) -> bool:
    """Return whether the artifact is smaller or faster: beyond the noise of one launch where there is no interval."""
    smaller = gains.size_ratio is not None and gains.size_ratio >= SMALLER
    if gains.speedup_low is not None:
        return smaller or gains.speedup_low > 1
    return smaller or (gains.speedup is not None and gains.speedup > AS_FAST_ONCE)


def holds(drop: float, guard: float) -> bool:
    """Return whether a quality drop is within the guard."""
    return drop <= guard + ROUNDING


def passes(quality: Quality, guard: float) -> bool:
    """Return whether a result passes the quality guard and ruins no output that the metric does not read."""
    return holds(quality.drop, guard) and not quality.ruined


def drop_with_margin(drop: float, high: float, guard: float) -> float:
    """Return the upper end of the drop's 95 % interval on selection samples, bounded above the drop.

    With few samples that end exceeds any guard, so the margin is at most a share of the guard.
    """
    return drop + max(0.0, min(high - drop, MARGIN_SHARE * guard))


def is_decided(quality: Quality, guard: float) -> bool:
    """Return whether the interval excludes the guard, with the rounding of the verdict."""
    return holds(quality.high, guard) or not holds(quality.low, guard)


def samples_needed(quality: Quality, guard: float) -> int | None:
    """Estimate the evaluation samples for a decision; None where decided, or where no set could decide."""
    if is_decided(quality, guard) or abs(quality.drop - guard) <= ROUNDING:
        return None
    needed = quality.samples_to_decide(guard)
    return needed if needed is not None and needed <= MAX_SAMPLES else None


def outcome_of(gains: Gains, quality: Quality, guard: float) -> Outcome:
    """Return the outcome: guard and ruined outputs first, then whether there is a gain."""
    if quality.ruined or not holds(quality.drop, guard):
        return "guard_failed"
    return "ok" if is_gain(gains) else "no_gain"


def verdict_sentence(outcome: Outcome, name: str, gains: Gains, quality: Quality, guard: float) -> str:
    """Return the first sentence of a summary, for the candidate `name`."""
    became = f"{size_phrase(gains)}, {speed_phrase(gains)}"
    if quality.ruined:
        failed = "" if holds(quality.drop, guard) else f" The quality drop {quality.drop:.4f} is above {guard:g} too."
        return f"{ruined_sentence(quality.ruined)}{failed} {name} is {became}."
    if outcome == "guard_failed":
        return f"Quality guard failed: {name} is closest; drop {quality.drop:.4f} is above {guard:g}. It is {became}."
    return f"{name}: {became}." if outcome == "ok" else f"No gain. The best candidate, {name}, is {became}."


def ruined_sentence(ruined: Sequence[OutputAgreement]) -> str:
    """Return a sentence on the ruined outputs, each with its error."""
    parts = []
    for output in ruined:
        if output.ruined_part is not None:
            part = output.ruined_part
            among = f"{part.count} of the " if 0 < part.count <= part.last - part.first else ""
            place = f"{among}entries {part.first} to {part.last} of dimension {part.axis}"
            error = f"{place}, of a smaller scale: relative error {part.relative_error:.2f}, above {RUINED_PART:g}"
        elif output.relative_error is not None:
            error = f"relative error {output.relative_error:.2f}, above {RUINED_ERROR:g}"
        else:
            error = f"agreement {output.agreement:.0%}, below {RUINED_AGREEMENT:.0%}"
        parts.append(f"'{output.spec.name}' ({error})")
    one = "Output" if len(parts) == 1 else "Outputs"
    was = "was" if len(parts) == 1 else "were"
    unseen = "show" if any(output.ruined_part for output in ruined) else "read"
    return f"{one} {', '.join(parts)} {was} ruined; the metric does not {unseen} {'it' if len(parts) == 1 else 'them'}."


def quality_warnings(quality: Quality | None, guard: float, real_data: bool, labelled: bool = False) -> list[str]:
    """Return the warnings on the quality.

    Args:
        quality: None where nothing was evaluated.
        guard: the largest quality drop that is allowed.
        real_data: False for random inputs.
        labelled: whether the evaluation data has targets, which a metric of agreement does not read.
    """
    if quality is None:
        return []
    hidden = f", which the accuracy on all {quality.samples:,} samples hides" if holds(quality.drop, guard) else ""
    warnings = [
        f"the recall of class {lost.label} fell from {lost.before:.0%} to {lost.after:.0%} ({lost.samples} samples)"
        f"{hidden}"
        for lost in quality.lost_classes[:MAX_CLASSES]
    ]
    if not real_data:
        warnings.append(
            f"{quality.metric} was measured on random inputs: it is not accuracy. Give data to measure accuracy."
        )
    elif quality.is_agreement:
        why = "it does not read the data's targets" if labelled else "the data has no targets"
        warnings.append(f"{quality.metric} is agreement with the original model, not accuracy: {why}")
    if not math.isfinite(quality.high - quality.low):
        warnings.append(
            f"the drop of {quality.metric} has no confidence interval: there are too few samples, samples cannot be "
            "resampled one by one, or the metric is too slow for a bootstrap or constant over resamples"
        )
    elif not is_decided(quality, guard):
        needed = samples_needed(quality, guard)
        more = f"about {needed:,} samples would decide" if needed else "no evaluation set can decide this"
        warnings.append(
            f"{quality.samples} samples cannot decide whether the drop is within {guard:g} "
            f"(95 % interval {quality.low:+.4f} to {quality.high:+.4f}); {more}"
        )
    return warnings


def load_warnings(load: float | None) -> list[str]:
    """Return the warnings on the load by other processes during timing."""
    if load is None or load <= BUSY:
        return []
    if load > OVERLOADED:
        return [
            f"other processes used {load:.0%} of the CPU: times are unreliable, and no speedup is reported; "
            "measure again on an idle machine: `omgoptim compare` times existing artifacts"
        ]
    return [f"other processes used {load:.0%} of the CPU: times are longer and intervals wider than on an idle machine"]
