"""95 % intervals of a drop in quality, both models scored on the same samples.

Sources: Bonett & Price 2012 (difference of paired proportions); percentile bootstrap, paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import OmgoptimError

Arrays = list[NDArray[Any]]
Drop = Callable[[Sequence[Arrays], Sequence[Arrays], list[Any]], float]
"""`drop(before, after, targets)`: the metric before minus the metric after."""

UNKNOWN = (-math.inf, math.inf)
"""Interval if nothing is known."""
Z_975 = 1.959964
"""97.5 % quantile of the standard normal distribution."""

RESAMPLES = 200
"""Bootstrap resamples; Efron and Tibshirani (1993) find 50 to 200 enough for a standard error."""
MIN_RESAMPLES = 40
"""The 2.5 % quantile of fewer is their smallest, which is no quantile."""

BUDGET_S = 20.0
"""Longest time, in seconds, that a metric is recomputed for the sake of its interval."""

MAX_FAILING = 0.1
"""Fraction of resamples on which a metric may fail (a class is missing, say) before nothing can be said."""


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
    sizes = [len(batch[0]) for batch in before]
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
            drops.append(drop(sides[0], sides[1], [_target_rows(targets[b], rows) for b, rows in chosen]))
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


def _target_rows(target: Any, rows: NDArray[np.int64]) -> Any:
    return None if target is None else target[rows]


def _rows(array: NDArray[Any], rows: NDArray[np.int64], size: int) -> NDArray[Any]:
    """Return the drawn samples of an output; the whole of one without a batch dimension (an LSTM's state)."""
    return array[rows] if array.ndim and len(array) == size else array
