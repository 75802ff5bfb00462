"""Quality of two artifacts on the same samples: the metric, the drop with its interval, and how far they agree.

Metrics work on what the measuring processes wrote: for each batch the flat list of output arrays. A built-in metric
gives a score per sample, so that the drop is a paired difference; any other is recomputed on resamples.

Sources: Bonett & Price 2012 (interval for a difference of paired proportions); percentile bootstrap, paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError

Arrays = list[NDArray[Any]]
IGNORED_TARGET = -100
Z = 1.959964
RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class Metric:
    """A quality metric, higher is better.

    Exactly one of `per_sample` and `whole` is set. Both take outputs and targets batch by batch; `per_sample` also
    takes the original model's outputs, for metrics that are an agreement with it.
    """

    name: str
    per_sample: Callable[[list[Arrays], list[Any], list[Arrays]], NDArray[np.float64]] | None = None
    whole: Callable[[list[Arrays], list[Any]], float] | None = None
    agreement: bool = False
    """Whether it compares with the original model rather than with targets."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality before and after, the drop with its 95 % interval, and what would decide the guard."""

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
        """How many samples would likely decide, if these cannot; None where the drop sits on the guard itself."""
        distance = abs(guard - self.drop)
        half = max(self.high - self.drop, self.drop - self.low)
        if distance < 1e-9:
            return None
        return math.ceil(self.samples * (half / distance) ** 2)


def read_outputs(folder: Path) -> list[Arrays]:
    """What a measuring process wrote: per batch the output arrays."""
    batches = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            batches.append([file[str(index)] for index in range(len(file.files))])
    return batches


def score(metric: Metric, outputs: list[Arrays], targets: list[Any], original: list[Arrays]) -> float:
    """The metric's value on all samples."""
    if metric.per_sample:
        scores = metric.per_sample(outputs, targets, original)
        if not len(scores):
            raise DataError("no sample of the data counts for the metric", f"every target is {IGNORED_TARGET}")
        return float(scores.mean())
    if metric.whole is None:
        raise ValueError(f"metric {metric.name} has no function")
    return _finite(metric.whole(outputs, targets), metric.name)


def compare_quality(
    metric: Metric, before: list[Arrays], after: list[Arrays], targets: list[Any], seed: int
) -> Quality:
    """Quality of `after` against `before` on the same samples."""
    value_before = score(metric, before, targets, before)
    value_after = score(metric, after, targets, before)
    if metric.per_sample:
        a = metric.per_sample(before, targets, before)
        b = metric.per_sample(after, targets, before)
        low, high = _paired_interval(a, b)
        samples = len(a)
    else:
        low, high = _bootstrap_interval(metric, before, after, targets, seed)
        samples = sum(len(batch[0]) for batch in before)
    agree = agreement_metric(before).per_sample
    agreement = float(agree(after, targets, before).mean()) if agree else math.nan
    drop = value_before - value_after
    return Quality(metric.name, value_before, value_after, drop, low, high, agreement, samples)


def agreement_metric(original: list[Arrays]) -> Metric:
    """Agreement with the original model on its first output.

    Rows of class scores (two-dimensional, not of unit length) agree when their largest entry is the same one; anything
    else is compared by the cosine of the whole output, sample by sample.
    """
    first = original[0][0]
    if first.ndim == 2 and first.shape[1] >= 2 and np.issubdtype(first.dtype, np.floating):
        lengths = np.linalg.norm(first.astype(np.float64), axis=1)
        if not np.allclose(lengths, 1.0, atol=1e-3):
            return Metric("top1_agreement", per_sample=_top1_agreement, agreement=True)
    return Metric("cosine_agreement", per_sample=_cosine, agreement=True)


def builtin_metric(name: str, original: list[Arrays], targets: list[Any]) -> Metric | None:
    """The built-in metric of that name (`auto` chooses by the targets); None if it is none of ours."""
    labelled = bool(targets) and targets[0] is not None
    if name == "auto":
        if not labelled:
            return agreement_metric(original)
        name = "top1" if np.issubdtype(np.asarray(targets[0]).dtype, np.integer) else "r2"
    if name == "cosine":
        return Metric("cosine_agreement", per_sample=_cosine, agreement=True)
    if name in ("top1", "r2") and not labelled:
        raise DataError(f"metric '{name}' needs targets", "the data's batches carry none", "use metric auto or cosine")
    if name == "top1":
        return Metric("top1_accuracy", per_sample=_top1)
    if name == "r2":
        return Metric("r2", whole=_r2)
    return None


def _top1(outputs: list[Arrays], targets: list[Any], original: list[Arrays]) -> NDArray[np.float64]:
    """1 where the largest score is the target's class. Scores are (N, C) or (N, ..., C); targets (N) or (N, ...)."""
    del original
    hits = []
    for batch, raw in zip(outputs, targets, strict=True):
        scores, target = batch[0], np.asarray(raw)
        if scores.ndim < 2:
            predicted = (scores > 0).astype(target.dtype)
        elif scores.shape[:-1] == target.shape:
            predicted = scores.argmax(-1)
        elif scores.ndim == target.ndim + 1 and scores.shape[2:] == target.shape[1:]:
            predicted = scores.argmax(1)  # class dimension second, as cross_entropy takes it
        else:
            raise DataError(
                "the targets do not fit the outputs",
                f"outputs are {scores.shape}, integer targets {target.shape}",
                "give a metric of your own: --metric file.py:callable",
            )
        hits.append((predicted == target)[target != IGNORED_TARGET].astype(np.float64).ravel())
    return np.concatenate(hits)


def _top1_agreement(outputs: list[Arrays], targets: list[Any], original: list[Arrays]) -> NDArray[np.float64]:
    del targets
    same = [a[0].argmax(1) == b[0].argmax(1) for a, b in zip(outputs, original, strict=True)]
    return np.concatenate(same).astype(np.float64)


def _cosine(outputs: list[Arrays], targets: list[Any], original: list[Arrays]) -> NDArray[np.float64]:
    del targets
    cosines = []
    for batch, reference in zip(outputs, original, strict=True):
        a = batch[0].reshape(len(batch[0]), -1).astype(np.float64)
        b = reference[0].reshape(len(reference[0]), -1).astype(np.float64)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        both_zero = (np.abs(a).sum(1) == 0) & (np.abs(b).sum(1) == 0)
        cosine = (a * b).sum(1) / np.where(lengths > 0, lengths, 1.0)
        cosines.append(np.where(both_zero, 1.0, np.minimum(cosine, 1.0)))
    return np.concatenate(cosines)


def _r2(outputs: list[Arrays], targets: list[Any]) -> float:
    predicted = np.concatenate([batch[0].reshape(len(batch[0]), -1) for batch in outputs]).astype(np.float64)
    actual = np.concatenate([np.asarray(t).reshape(len(t), -1) for t in targets]).astype(np.float64)
    if predicted.shape != actual.shape:
        raise DataError("the targets do not fit the outputs", f"outputs {predicted.shape}, targets {actual.shape}")
    spread = float(((actual - actual.mean(0)) ** 2).sum())
    return 1.0 - float(((actual - predicted) ** 2).sum()) / spread if spread > 0 else 0.0


def _paired_interval(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of before - after."""
    difference = before - after
    count = len(difference)
    if set(np.unique(difference)) <= {-1.0, 0.0, 1.0} and set(np.unique(before)) <= {0.0, 1.0}:
        lost, won = (int((difference == sign).sum()) for sign in (1, -1))  # Bonett & Price: one more of each
        p, q = (lost + 1) / (count + 2), (won + 1) / (count + 2)
        half = Z * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
        return p - q - half, p - q + half
    spread = float(difference.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return float(difference.mean()) - Z * spread, float(difference.mean()) + Z * spread


def _bootstrap_interval(
    metric: Metric, before: list[Arrays], after: list[Arrays], targets: list[Any], seed: int
) -> tuple[float, float]:
    """Percentile bootstrap of the drop: the same resampled samples for both."""
    random = np.random.default_rng(seed)
    sizes = [len(batch[0]) for batch in before]
    place = [(b, i) for b, size in enumerate(sizes) for i in range(size)]
    drops = []
    for _ in range(RESAMPLES):
        chosen: list[list[int]] = [[] for _ in sizes]
        for index in random.integers(0, len(place), len(place)):
            chosen[place[index][0]].append(place[index][1])
        picked = [(b, rows) for b, rows in enumerate(chosen) if rows]
        drawn_targets = [None if targets[b] is None else np.asarray(targets[b])[rows] for b, rows in picked]
        values = [
            score(metric, [[array[rows] for array in side[b]] for b, rows in picked], drawn_targets, [])
            for side in (before, after)
        ]
        drops.append(values[0] - values[1])
    low, high = np.quantile(drops, [0.025, 0.975])
    return float(low), float(high)


def _finite(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise DataError(f"metric {name} gave {number}", "a metric must give a finite number, higher is better")
    return number


def sample_count(outputs: Sequence[Arrays]) -> int:
    """Samples over all batches."""
    return sum(len(batch[0]) for batch in outputs)
