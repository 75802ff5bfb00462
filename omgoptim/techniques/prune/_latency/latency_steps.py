"""Steps of latency over width: kernels work in tiles of channels, so latency rises only at some widths.

Pure functions on measured times. Noise is smaller than steps: a narrower layer that measures slower by less
than the scatter of the measurement is noise, and is smoothed; one that measures slower by more is how the engine is
(a width that falls off the fast kernel), and stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

FLAT = 0.02
"""A rise of less than this fraction is no step."""

ROUNDINGS = (8, 16, 32)
"""Blocks of channels that kernels are known to work in."""

DEFAULT_ROUNDING = 8

CLEARER = 0.5
"""A block explains the times when it leaves less than this fraction of the squares that a straight line leaves."""


def staircase(times: Mapping[int, float], candidates: Sequence[int], tolerance: float = FLAT) -> tuple[int, ...]:
    """The widths just before a rise: the only ones worth choosing, as more channels cost nothing up to there.

    Args:
        times: width to time, in any unit, for every candidate.
        candidates: widths to choose from.
        tolerance: a rise of up to this fraction is no step.

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
    """Times that do not fall as a layer widens, where a fall is within `tolerance`; larger falls stay.

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
    """The closest non-decreasing sequence in least squares."""
    pools: list[tuple[float, int]] = []  # sum, count
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, members = pools.pop()
            total, count = total + before, count + members
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def rounding_of(times: Mapping[int, float]) -> int:
    """The block of channels that best explains how time rises with width; 8 if none is clear.

    For each block b, time is fitted as `a + c * ceil(width / b)`; a block is believed when it leaves less than half
    of the squared error of a straight line in the width, the largest such one that is no worse than another's.

    Args:
        times: width to time, in any unit: widths between the multiples of the blocks as well, or nothing can be told.
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
    """Sum of squares that a straight line in `steps` leaves of `values`."""
    design = np.stack([np.ones_like(steps), steps], axis=1)
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(((values - design @ solution) ** 2).sum())
