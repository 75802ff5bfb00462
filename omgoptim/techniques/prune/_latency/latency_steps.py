"""Steps of latency over width: kernels work in tiles of channels, so latency rises only at some widths.

Pure functions on measured times. Noise is smaller than steps: a narrower layer that measures slower within the scatter
of the measurement is smoothed; one that measures slower by more (a width without a fast kernel) is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

FLAT = 0.02
"""Minimum relative rise that counts as a step."""

ROUNDINGS = (8, 16, 32)
"""Tile sizes of kernels, in channels."""

DEFAULT_ROUNDING = 8
"""Smallest tile size of the common kernels: 8 float32 fill an AVX2 register."""

CLEARER = 0.5
"""Maximum residual of a tile size's fit relative to that of a straight line."""


def staircase(times: Mapping[int, float], candidates: Sequence[int], tolerance: float = FLAT) -> tuple[int, ...]:
    """Return the widths just before a rise: more channels cost nothing up to there.

    Args:
        times: width to time, in any unit, for every candidate.
        candidates: widths to choose from.
        tolerance: a rise of up to this fraction is not a step.

    Returns:
        Ascending; the widest candidate is always one. A width that is slower than a wider one is none.
    """
    edges: list[int] = []
    cheapest = math.inf
    for width in sorted(set(candidates), reverse=True):
        if not edges or times[width] * (1 + tolerance) < cheapest:
            edges.append(width)
            cheapest = times[width]
    return tuple(reversed(edges))


def smooth(ms: Sequence[Sequence[float]], tolerance: float) -> tuple[tuple[float, ...], ...]:
    """Return times that do not fall as a layer widens; falls within `tolerance` are smoothed, larger ones stay.

    Isotonic regression (pool adjacent violators, on logarithms) along the second axis and then the first, which keeps
    the second in order.

    Args:
        ms: times by (input size, output size), both ascending; all positive.
        tolerance: the largest fall, as a fraction, that is taken for noise.
    """
    logs = np.log(np.asarray(ms, dtype=float))
    rows = np.array([_in_order(row.tolist(), tolerance) for row in logs])
    columns = np.array([_in_order(column.tolist(), tolerance) for column in rows.T])
    return tuple(tuple(float(value) for value in row) for row in np.exp(columns.T))


def _in_order(logs: Sequence[float], tolerance: float) -> list[float]:
    """Pool adjacent violators, cut where a fall is too large to be noise."""
    fall = math.log1p(tolerance)
    smoothed: list[float] = []
    start = 0
    for end in range(1, len(logs) + 1):
        if end == len(logs) or logs[end - 1] - logs[end] > fall:
            smoothed += _pooled(logs[start:end])
            start = end
    return smoothed


def _pooled(values: Sequence[float]) -> list[float]:
    """Return the closest non-decreasing sequence in least squares."""
    pools: list[tuple[float, int]] = []  # sum, count
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, members = pools.pop()
            total, count = total + before, count + members
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def rounding_of(times: Mapping[int, float]) -> int:
    """Return the tile size that best explains how time rises with width; 8 if none is clear.

    For each block b, time is fitted as `a + c * ceil(width / b)`; a block is believed when it leaves less than half
    of the squared error of a straight line in the width, the largest such one that is no worse than another's.

    Args:
        times: width to time, in any unit: also widths between multiples of the tile sizes.
    """
    widths = np.array(sorted(times), dtype=float)
    values = np.array([times[int(width)] for width in widths])
    line = _left(widths, values)
    if line <= 1e-9 * float(values.var() * len(values)):  # no stairs at all, or no rise
        return DEFAULT_ROUNDING
    errors = {block: _left(np.ceil(widths / block), values) for block in ROUNDINGS}
    best = min(errors, key=lambda block: (errors[block], -block))
    return best if errors[best] < CLEARER * line else DEFAULT_ROUNDING


def _left(
    steps: np.ndarray[tuple[int], np.dtype[np.float64]], values: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> float:
    """Return the residual sum of squares of a linear fit of `values` to `steps`."""
    design = np.stack([np.ones_like(steps), steps], axis=1)
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(((values - design @ solution) ** 2).sum())
