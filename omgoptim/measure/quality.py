"""Quality of two artifacts on the same samples: the metric, the drop with its interval, and how far they agree.

Metrics work on what the measuring processes wrote: for each batch the flat list of output arrays. A built-in metric
gives a score per sample, so that the drop is a paired difference; any other is recomputed on resamples.
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

from omgoptim.errors import DataError, argument
from omgoptim.measure.intervals import Arrays, affordable_resamples, paired_interval, resampled_interval
from omgoptim.measure.language import negative_kl, token_log_likelihoods

IGNORED_TARGET = -100


@dataclass(frozen=True, slots=True)
class Metric:
    """A quality metric, higher is better.

    Exactly one of `per_sample` and `whole` is set. Both take outputs and targets batch by batch; `per_sample` also
    takes the original model's outputs, for metrics that are an agreement with it.
    """

    name: str
    per_sample: Callable[[Sequence[Arrays], list[Any], Sequence[Arrays]], NDArray[np.float64]] | None = None
    whole: Callable[[Sequence[Arrays], list[Any]], float] | None = None
    agreement: bool = False
    """Whether it compares with the original model rather than with targets."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality before and after, the drop with its 95 % interval (infinite where it is unknown)."""

    metric: str
    before: float
    after: float
    drop: float
    low: float
    high: float
    agreement: float
    samples: int

    def decided(self, guard: float) -> bool:
        """Whether the interval says on which side of the guard the drop is."""
        return self.high <= guard or self.low > guard

    def samples_to_decide(self, guard: float) -> int | None:
        """How many samples would likely decide, if these cannot; None where the drop sits on the guard itself, or
        where the interval is unknown."""
        distance = abs(guard - self.drop)
        half = max(self.high - self.drop, self.drop - self.low)
        if distance < 1e-9 or math.isinf(half):
            return None
        return math.ceil(self.samples * (half / distance) ** 2)


class StoredOutputs(Sequence[Arrays]):
    """The outputs of each batch, read from its file when asked for: those of a segmentation network or a language model
    do not fit in memory together."""

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
    """What a measuring process wrote: per batch the output arrays."""
    return StoredOutputs(sorted(folder.glob("*.npz")))


def score(metric: Metric, outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]) -> float:
    """The metric's value on all samples."""
    if metric.per_sample:
        return _finite(_sample_scores(metric, outputs, targets, original).mean(), metric.name)
    if metric.whole is None:
        raise ValueError(f"metric {metric.name} has no function")
    return _finite(metric.whole(outputs, targets), metric.name)


def _sample_scores(
    metric: Metric, outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]
) -> NDArray[np.float64]:
    if metric.per_sample is None:
        raise ValueError(f"metric {metric.name} has no score per sample")
    scores = metric.per_sample(outputs, targets, original)
    if not len(scores):
        raise DataError("no sample of the data counts for the metric", f"every target is {IGNORED_TARGET}")
    return scores


def compare_quality(
    metric: Metric,
    before: Sequence[Arrays],
    after: Sequence[Arrays],
    targets: list[Any],
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    original: Sequence[Arrays] | None = None,
) -> Quality:
    """Quality of `after` against `before` on the same samples.

    Args:
        seed: of the resamples.
        original: outputs of the original model, which an agreement is one with; default: `before`.
        clock: seconds; by its own time a metric is recomputed on many resamples, on fewer, or on none.

    Raises:
        DataError: the metric cannot be computed on either, or gives no finite number.
    """
    if metric.per_sample:
        reference = before if original is None else original
        scores = [_sample_scores(metric, side, targets, reference) for side in (before, after)]
        values = [_finite(side.mean(), metric.name) for side in scores]
        low, high = paired_interval(*scores)
        samples = len(scores[0])
    else:
        before, after = list(before), list(after)  # a whole metric takes all batches at once, again on each resample
        times, values = [clock()], []
        for side in (before, after):
            values.append(score(metric, side, targets, before))
            times.append(clock())
        both = 2 * min(times[1] - times[0], times[2] - times[1])  # a first call may import and compile

        def drop(one: Sequence[Arrays], other: Sequence[Arrays], drawn: list[Any]) -> float:
            return score(metric, one, drawn, one) - score(metric, other, drawn, one)

        low, high = resampled_interval(drop, before, after, targets, seed, affordable_resamples(both))
        samples = sample_count(before)
    agreement = score(agreement_metric(before), after, targets, before)
    return Quality(metric.name, values[0], values[1], values[0] - values[1], low, high, agreement, samples)


def agreement_metric(original: Sequence[Arrays]) -> Metric:
    """Agreement with the original model on its first output.

    Rows of class scores (two-dimensional, not of unit length unless they are probabilities) agree when their largest
    entry is the same one; anything else is compared by the cosine of the whole output, sample by sample.

    Raises:
        DataError: the first output is a single number, so that there are no samples in it.
    """
    first = original[0][0]
    if first.ndim == 0:
        raise DataError(
            "the model's first output is a single number",
            "quality is compared sample by sample, and it has no batch dimension",
            "let forward return its predictions first, without a loss",
        )
    if first.ndim == 2 and first.shape[1] >= 2 and np.issubdtype(first.dtype, np.floating):
        rows = first.astype(np.float64)
        embeddings = np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-3)
        probabilities = bool((rows >= 0).all()) and np.allclose(rows.sum(1), 1.0, atol=1e-3)
        if probabilities or not embeddings:
            return Metric("top1_agreement", per_sample=_top1_agreement, agreement=True)
    return Metric("cosine_agreement", per_sample=_cosine, agreement=True)


def builtin_metric(name: str, original: Sequence[Arrays], targets: list[Any]) -> Metric | None:
    """The built-in metric of that name (`auto` chooses by the targets); None if it is none of ours."""
    labelled = bool(targets) and targets[0] is not None
    if name == "auto":
        if not labelled:
            return agreement_metric(original)
        name = _kind_of_targets(np.asarray(targets[0]).dtype)
    if name == "cosine":
        return Metric("cosine_agreement", per_sample=_cosine, agreement=True)
    if name == "kl":
        return Metric("negative_kl", per_sample=negative_kl, agreement=True)
    if name in ("top1", "r2", "perplexity") and not labelled:
        raise DataError(f"metric '{name}' needs targets", "the data's batches carry none", "use metric auto or cosine")
    if name == "top1":
        return Metric("top1_accuracy", per_sample=_top1)
    if name == "r2":
        return Metric("r2", whole=_r2)
    if name == "perplexity":  # higher is better: its logarithm, negated
        return Metric("log_likelihood_per_token", per_sample=token_log_likelihoods)
    return None


def _kind_of_targets(dtype: np.dtype[Any]) -> str:
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return "top1"
    if np.issubdtype(dtype, np.floating):
        return "r2"
    raise DataError(
        "there is no built-in metric for the data's targets",
        f"they are {dtype}; integers are read as classes, floats as values",
        f"give a metric of your own: {argument('metric', 'file.py:callable')}",
    )


def _top1(outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]) -> NDArray[np.float64]:
    """Per sample, how many of its targets the largest score hits, over the mean number of targets of a sample.

    With one target per sample that is 1 or 0. With several (tokens, pixels) the mean is still hits over targets, and a
    sample stays one unit: its targets are not independent. Samples without a target that counts are left out.

    Scores are (N, C), (N, ..., C) or (N, C, ...), targets (N) or (N, ...). A single score per target is a logit, or
    a probability if all of the original's lie in [0, 1].
    """
    cut = 0.5 if all(((batch[0] >= 0) & (batch[0] <= 1)).all() for batch in original) else 0.0
    hits, counted = [], []
    for batch, raw in zip(outputs, targets, strict=True):
        scores, target = batch[0], np.asarray(raw)
        counts = target != IGNORED_TARGET
        right = (_predicted(scores, target, cut) == target) & counts
        hits.append(right.reshape(len(target), -1).sum(1))
        counted.append(counts.reshape(len(target), -1).sum(1))
    total = np.concatenate(counted)
    used = total > 0
    return np.concatenate(hits)[used] / total[used].mean() if used.any() else np.zeros(0)


def _predicted(scores: NDArray[Any], target: NDArray[Any], cut: float) -> NDArray[Any]:
    """The class of each target, in the targets' shape."""
    if scores.size == target.size and (scores.ndim < 2 or 1 in (scores.shape[1], scores.shape[-1])):
        return np.asarray(scores.reshape(target.shape) > cut, target.dtype)
    if scores.shape[:-1] == target.shape:
        return np.asarray(scores.argmax(-1))
    if scores.ndim == target.ndim + 1 and scores.shape[:1] + scores.shape[2:] == target.shape:
        return np.asarray(scores.argmax(1))  # class dimension second, as cross_entropy takes it
    raise DataError(
        "the targets do not fit the outputs",
        f"outputs are {scores.shape}, integer targets {target.shape}",
        f"give a metric of your own: {argument('metric', 'file.py:callable')}",
    )


def _top1_agreement(outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]) -> NDArray[np.float64]:
    del targets
    same = [a[0].argmax(1) == b[0].argmax(1) for a, b in zip(outputs, original, strict=True)]
    return np.concatenate(same).astype(np.float64)


def _cosine(outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]) -> NDArray[np.float64]:
    del targets
    cosines = []
    for batch, reference in zip(outputs, original, strict=True):
        a = batch[0].reshape(len(batch[0]), -1).astype(np.float64)
        b = reference[0].reshape(len(reference[0]), -1).astype(np.float64)
        same = np.isinf(a) & (a == b)  # masked on both sides
        a, b = np.where(same, 0.0, a), np.where(same, 0.0, b)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise DataError("the outputs hold infinite values that the original's do not", "or the other way round")
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        both_zero = (np.abs(a).sum(1) == 0) & (np.abs(b).sum(1) == 0)
        cosine = (a * b).sum(1) / np.where(lengths > 0, lengths, 1.0)
        cosines.append(np.where(both_zero, 1.0, np.minimum(cosine, 1.0)))
    return np.concatenate(cosines)


def _r2(outputs: Sequence[Arrays], targets: list[Any]) -> float:
    predicted = np.concatenate([batch[0].reshape(len(batch[0]), -1) for batch in outputs]).astype(np.float64)
    try:
        actual = np.concatenate([np.asarray(t, np.float64).reshape(len(t), -1) for t in targets])
    except (TypeError, ValueError) as error:
        raise DataError("metric r2 needs targets that are numbers", str(error)) from error
    if predicted.shape != actual.shape:
        raise DataError("the targets do not fit the outputs", f"outputs {predicted.shape}, targets {actual.shape}")
    spread = float(((actual - actual.mean(0)) ** 2).sum())
    if spread == 0:
        raise DataError(
            "r2 is not defined where all targets are the same",
            f"{len(actual)} samples, and no spread to explain",
            f"give more evaluation samples, or a metric of your own: {argument('metric', 'file.py:callable')}",
        )
    return 1.0 - float(((actual - predicted) ** 2).sum()) / spread


def _finite(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise DataError(f"metric {name} gave {number}", "a metric must give a finite number, higher is better")
    return number


def sample_count(outputs: Sequence[Arrays]) -> int:
    """Samples over all batches."""
    return sum(len(batch[0]) for batch in outputs)
