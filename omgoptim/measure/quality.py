"""Quality of two artifacts on the same samples: metric, drop with its 95 % interval, and agreement of each output.

Metrics take the outputs that the measuring processes wrote: for each batch the flat list of arrays. A built-in metric
gives a score per sample, so that the drop is a paired difference; any other is recomputed on resamples.
Sources: Bonett & Price 2012 (difference of paired proportions); percentile bootstrap, paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError, OmgoptimError
from omgoptim.measure.agreement import OutputAgreement, output_agreements
from omgoptim.measure.builtin_metrics import Metric, batch_first, batch_lengths, detect_outputs
from omgoptim.models.labels import IGNORED, plain_labels
from omgoptim.models.outputs import Arrays

Drop = Callable[[Sequence[Arrays], Sequence[Arrays], list[Any]], float]
"""`drop(before, after, targets)`: the metric before minus the metric after."""

UNKNOWN = (-math.inf, math.inf)
"""Interval if nothing is known."""

Z_975 = 1.959964
"""97.5 % quantile of the standard normal distribution."""

RESAMPLES = 200
"""Bootstrap resamples; Efron and Tibshirani (1993) find 50 to 200 enough for a standard error."""

MIN_RESAMPLES = 40
"""Minimum number of resamples for a 2.5 % quantile."""

BUDGET_S = 20.0
"""Longest time, in seconds, of recomputing a metric for its interval. Chosen: about that of one evaluation."""

MAX_FAILING = 0.1
"""Fraction of resamples on which a metric may fail before the interval is unknown. Chosen: the rest is biased."""

LOST_RECALL = 0.1
"""Drop of recall that a class's 95 % interval must exceed to count as lost. Chosen: smaller drops are noisy."""


@dataclass(frozen=True, slots=True)
class LostClass:
    """A class whose samples are recognized less often, which the accuracy over all classes can hide."""

    label: int
    samples: int
    before: float
    """Fraction of its samples that were right."""
    after: float


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality before and after, and the drop with its 95 % interval (infinite if unknown)."""

    metric: str
    before: float
    after: float
    drop: float
    low: float
    high: float
    agreement: float
    """With the original, of the output where it is the lowest, 0..1; see `measure.agreement`."""
    samples: int
    outputs: tuple[OutputAgreement, ...] = ()
    """Each output against the original's."""
    is_agreement: bool = False
    """The metric itself is an agreement with the original model."""
    lost_classes: tuple[LostClass, ...] = ()
    """The worst first; empty where the metric is no accuracy of one label a sample."""

    @property
    def ruined(self) -> tuple[OutputAgreement, ...]:
        """Return the outputs that are ruined where the metric does not show it, the worst first."""
        lost = [output for output in self.outputs if output.lost]
        return tuple(sorted(lost, key=lambda output: output.agreement))

    def decided(self, guard: float) -> bool:
        """Return whether the interval lies on one side of the guard."""
        return self.high <= guard or self.low > guard

    def samples_to_decide(self, guard: float) -> int | None:
        """Estimate the samples needed for a decision; None if the drop equals the guard or the interval is unknown."""
        distance = abs(guard - self.drop)
        half = max(self.high - self.drop, self.drop - self.low)
        if distance < 1e-9 or math.isinf(half):
            return None
        return math.ceil(self.samples * (half / distance) ** 2)


class StoredOutputs(Sequence[Arrays]):
    """Outputs of each batch, read from file on access: those of segmentation or language models exceed the memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Arrays: ...
    @overload
    def __getitem__(self, index: slice) -> StoredOutputs: ...
    def __getitem__(self, index: int | slice) -> Arrays | StoredOutputs:
        if isinstance(index, slice):
            return StoredOutputs(self._paths[index])
        with np.load(self._paths[index], allow_pickle=False) as file:
            return [file[str(number)] for number in range(len(file.files))]


def read_outputs(folder: Path) -> StoredOutputs:
    """Read the outputs that a measuring process wrote: per batch the output arrays."""
    return StoredOutputs(sorted(folder.glob("*.npz")))


def score(metric: Metric, outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]) -> float:
    """Compute the metric on all samples."""
    if metric.per_sample:
        return _finite(_sample_scores(metric, outputs, targets, original).mean(), metric.name)
    if metric.over_all is None:
        raise ValueError(f"metric {metric.name} has no function")
    return _finite(metric.over_all(outputs, targets), metric.name)


def _sample_scores(
    metric: Metric, outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]
) -> NDArray[np.float64]:
    if metric.per_sample is None:
        raise ValueError(f"metric {metric.name} has no score per sample")
    scores = metric.per_sample(outputs, targets, original)
    if not len(scores):
        raise DataError("the data has no target that the metric counts", f"every target is {IGNORED}")
    return scores


def compare_quality(
    metric: Metric,
    before: Sequence[Arrays],
    after: Sequence[Arrays],
    targets: list[Any],
    seed: int,
    original: Sequence[Arrays] | None = None,
) -> Quality:
    """Compute the quality of `after` against `before` on the same samples.

    Args:
        metric: as resolved for the original.
        before: outputs of the reference, per batch.
        after: outputs of the candidate for the same samples.
        targets: of the same batches; None for one without labels.
        seed: for the resamples.
        original: outputs of the original model, the reference of an agreement; default: `before`.

    Raises:
        DataError: the metric cannot be computed on either, or is not finite.
    """
    lost: tuple[LostClass, ...] = ()
    if metric.per_sample:
        reference = before if original is None else original
        scores = [_sample_scores(metric, side, targets, reference) for side in (before, after)]
        values = [_finite(side.mean(), metric.name) for side in scores]
        low, high = paired_interval(*scores)
        samples = len(scores[0])
        lost = lost_classes(metric, scores[0], scores[1], targets)
    else:
        before, after = list(before), list(after)  # a whole metric takes all batches at once, again on each resample
        values, (low, high) = _resampled(metric, before, after, targets, seed)
        samples = sample_count(before, targets)
    outputs = agreement_of_outputs(metric, after, before if original is None else original)
    agreement = min(output.agreement for output in outputs)
    return Quality(
        metric=metric.name,
        before=values[0],
        after=values[1],
        drop=values[0] - values[1],
        low=low,
        high=high,
        agreement=max(agreement, 0.0),
        samples=samples,
        outputs=outputs,
        is_agreement=metric.agreement,
        lost_classes=lost,
    )


def lost_classes(
    metric: Metric, before: NDArray[np.float64], after: NDArray[np.float64], targets: list[Any]
) -> tuple[LostClass, ...]:
    """Find the classes whose recall fell, the worst first.

    Args:
        metric: of the scores; only an accuracy of one label a sample has classes.
        before: 1 for each sample that was right, else 0.
        after: the same of the candidate.
        targets: labels of the samples, per batch; -100 is left out of the scores.
    """
    described = metric.outputs
    if described is None or metric.agreement or described.labels != "classes":
        return ()
    labels = [np.asarray(plain_labels(np.asarray(target), described.label_form)) for target in targets]
    if any(each.ndim != 1 for each in labels) or not set(np.unique(before)) <= {0.0, 1.0}:
        return ()
    joined = np.concatenate(labels)
    joined = joined[joined != IGNORED]
    found = []
    for label in np.unique(joined) if len(joined) == len(before) else ():
        rows = joined == label
        if paired_interval(before[rows], after[rows])[0] > LOST_RECALL:
            found.append(LostClass(int(label), int(rows.sum()), float(before[rows].mean()), float(after[rows].mean())))
    return tuple(sorted(found, key=lambda lost: lost.after - lost.before))


def _resampled(
    metric: Metric, before: list[Arrays], after: list[Arrays], targets: list[Any], seed: int
) -> tuple[list[float], tuple[float, float]]:
    """Compute a whole metric for both, and the drop's interval from as many resamples as its run time allows."""
    times, values = [time.perf_counter()], []
    for side in (before, after):
        values.append(score(metric, side, targets, before))
        times.append(time.perf_counter())
    both = 2 * min(times[1] - times[0], times[2] - times[1])  # a first call may import and compile

    def drop(one: Sequence[Arrays], other: Sequence[Arrays], drawn: list[Any]) -> float:
        one, other = (batch_first(side, metric.outputs, back=True) for side in (one, other))
        return score(metric, one, drawn, one) - score(metric, other, drawn, one)

    first, second = (batch_first(side, metric.outputs) for side in (before, after))
    return values, resampled_interval(drop, first, second, targets, seed, affordable_resamples(both))


def agreement_of_outputs(
    metric: Metric, candidate: Sequence[Arrays], original: Sequence[Arrays]
) -> tuple[OutputAgreement, ...]:
    """Compute the agreement of each output with the original's, independent of the metric."""
    outputs = metric.outputs or detect_outputs(original)
    if metric.reads is not None:
        return output_agreements(outputs, candidate, original, metric.reads)
    reads = frozenset(range(len(outputs.specs))) if len(outputs.specs) == 1 else frozenset()
    return output_agreements(outputs, candidate, original, reads, reported_in_full=reads)


def _finite(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise DataError(f"metric {name} returned {number}", "a metric must return a finite number; higher is better")
    return number


def sample_count(outputs: Sequence[Arrays], targets: Sequence[Any] = ()) -> int:
    """Return the samples over all batches."""
    return sum(batch_lengths(outputs, targets))


def paired_interval(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
    """Compute the 95 % interval of the mean of before - after.

    Args:
        before: one score per sample.
        after: scores of the same samples in the same order. Where all scores are 0 or 1 the interval is Bonett and
            Price's, which also holds when few samples differ; else the normal one. Where scores in steps (tokens of a
            sample) do not differ at all, it is Bonett and Price's in units of their smallest step.
    """
    difference = before - after
    count = len(difference)
    if set(np.unique(difference)) <= {-1.0, 0.0, 1.0} and set(np.unique(before)) <= {0.0, 1.0}:
        lost, won = (int((difference == sign).sum()) for sign in (1, -1))
        p, q = (lost + 1) / (count + 2), (won + 1) / (count + 2)
        half = Z_975 * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
        return p - q - half, p - q + half
    if count < 2:
        return UNKNOWN
    if not difference.any():
        step = float(np.diff(np.unique(before)).min(initial=1.0))
        half = step * Z_975 * math.sqrt(2) / (count + 2)
        return -half, half
    half = Z_975 * float(difference.std(ddof=1)) / math.sqrt(count)
    return float(difference.mean()) - half, float(difference.mean()) + half


def affordable_resamples(seconds: float) -> int:
    """Return the number of resamples that fit the time budget for a metric of `seconds`; 0 if too few do."""
    count = min(RESAMPLES, int(BUDGET_S / max(seconds, 1e-9)))
    return count if count >= MIN_RESAMPLES else 0


def resampled_interval(
    drop: Drop, before: Sequence[Arrays], after: Sequence[Arrays], targets: list[Any], seed: int, resamples: int
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a drop, with the same resamples for both models.

    Returns:
        The interval; `UNKNOWN` if the batches cannot be split into samples, the metric fails on many resamples, the
        resamples are too few, or they are all equal, as a metric with steps can be.
    """
    sizes = batch_lengths(before, targets)
    ends = np.cumsum(sizes)
    if not resamples or not all(map(_divisible, targets, sizes)):
        return UNKNOWN
    random = np.random.default_rng(seed)
    drops = []
    for _ in range(resamples):
        drawn = np.sort(random.integers(0, ends[-1], ends[-1]))
        parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
        chosen = [(b, rows - (ends[b] - sizes[b])) for b, rows in enumerate(parts) if len(rows)]
        sides = [[[_rows(a, rows, sizes[b]) for a in side[b]] for b, rows in chosen] for side in (before, after)]
        try:
            drawn_targets = [None if targets[b] is None else targets[b][rows] for b, rows in chosen]
            drops.append(drop(sides[0], sides[1], drawn_targets))
        except OmgoptimError:  # undefined on these samples only, for instance without a class
            continue
    if len(drops) < max(MIN_RESAMPLES, (1 - MAX_FAILING) * resamples):
        return UNKNOWN
    if min(drops) == max(drops):
        return UNKNOWN
    low, high = np.quantile(drops, [0.025, 0.975])
    return float(low), float(high)


def _divisible(target: Any, size: int) -> bool:
    """Return whether a batch's target has one entry per sample, and is not an object of the user's own."""
    return target is None or (isinstance(target, np.ndarray) and target.ndim > 0 and len(target) == size)


def _rows(array: NDArray[Any], rows: NDArray[np.int64], size: int) -> NDArray[Any]:
    """Return the drawn samples of an output; the whole of one without a batch dimension (an LSTM's state)."""
    return array[rows] if array.ndim and len(array) == size else array
