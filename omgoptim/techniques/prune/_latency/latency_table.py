"""Latency table of layers by width, the steps of latency over width, and the search for a target latency.

A table holds one measured time per layer and size. Between two measured sizes the larger one counts, so that a table
never predicts a time that was not measured. Layers outside the table and the calls between layers are not in it:
`next_target` computes the next target for the table from the measured times of the cuts so far. Kernels work in tiles
of channels, so latency rises only at some widths; a fall within the scatter of the measurement is noise and smoothed, a
larger one (a width without a fast kernel) is kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omgoptim.errors import TechniqueError

MIN_FRACTION, MAX_FRACTION = 0.01, 1.0
"""Bounds of the result of `next_target`. Chosen: 1 is the uncut model, and a cut to 1 % is never useful."""

MIN_STEP_RATIO = 0.5
"""Lower bound of the result of `next_target` over the previous one. Chosen: a steep line may be noise."""

TARGET_MARGIN = 0.01
"""Relative margin of `next_target` beyond the target. Chosen: a target missed by measurement noise costs a round."""

MIN_RISE = 0.02
"""Minimum relative rise that counts as a step. Chosen: lower takes noise for steps, higher misses small ones."""

TILE_SIZES = (8, 16, 32)
"""Tile sizes of kernels, in channels: the float32 numbers of an AVX2, of an AVX-512 and of two AVX-512 registers."""

DEFAULT_TILE_SIZE = 8
"""Smallest tile size of the common kernels: 8 float32 fill an AVX2 register."""

MAX_RESIDUAL_RATIO = 0.5
"""Maximum residual of a tile size's fit over that of a straight line. Chosen: more finds tile sizes in noise."""


@dataclass(frozen=True, slots=True)
class Side:
    """Dependence of one side of a layer on the widths of groups."""

    fixed: int
    """Features that no group determines."""
    parts: tuple[tuple[str, int], ...] = ()
    """Group, and the features that each of its channels stands for: 49 behind a flattened 7x7 map, 3 in a fused qkv."""

    def size(self, widths: Mapping[str, int]) -> int:
        """Return the features of this side at these widths of the groups."""
        return self.fixed + sum(widths[name] * features for name, features in self.parts)


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Time of one layer by its two sizes."""

    path: str
    in_side: Side
    out_side: Side
    ins: tuple[int, ...]
    """Measured input sizes, ascending. A single one where the output decides the input as well (depthwise)."""
    outs: tuple[int, ...]
    """Measured output sizes, ascending."""
    ms: tuple[tuple[float, ...], ...]
    """ms[i][o]: milliseconds of all calls of the layer in one forward at batch 1, at ins[i] and outs[o]."""

    def at(self, widths: Mapping[str, int]) -> float:
        """Return the milliseconds at these widths: those of the next larger measured sizes."""
        row = 0 if len(self.ins) == 1 else _at_or_above(self.ins, self.in_side.size(widths))
        return self.ms[row][_at_or_above(self.outs, self.out_side.size(widths))]

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the groups that its time depends on, each once."""
        return tuple(dict.fromkeys(name for side in (self.in_side, self.out_side) for name, _ in side.parts))


@dataclass(frozen=True, slots=True)
class TimeTable:
    """Measured times of all layers that belong to a group, on one engine of one machine."""

    runtime: str
    widths: Mapping[str, int]
    """Group to its full width."""
    candidates: Mapping[str, tuple[int, ...]]
    """Group to the widths to choose from, ascending; the last is the full one."""
    layers: tuple[LayerTimes, ...]
    unmeasured: tuple[str, ...] = ()
    """Members without a time of their own: not called as modules, or of an unknown kind."""


def predicted_ms(table: TimeTable, widths: Mapping[str, int]) -> float:
    """Return the total milliseconds of the table's layers.

    Args:
        table: what was measured.
        widths: group to kept width; a group that is not named keeps its full one.
    """
    full = {**table.widths, **widths}
    return sum(layer.at(full) for layer in table.layers)


def full_ms(table: TimeTable) -> float:
    """Return the total milliseconds of the table's layers before anything is removed."""
    return predicted_ms(table, {})


def allowed_widths(table: TimeTable, name: str, max_layer_ratio: float) -> tuple[int, ...]:
    """Return the widths of a group when at most `max_layer_ratio` of it, 0..1, is removed; never none."""
    full = table.widths[name]
    min_width = full * (1 - max_layer_ratio) - 1e-9
    return tuple(width for width in table.candidates[name] if width >= min_width) or (full,)


def min_ms(table: TimeTable, max_layer_ratio: float = 0.9) -> float:
    """Return the total time with every group at its narrowest width.

    Where a narrower layer was measured to be slower, a little less can be reached.
    """
    return predicted_ms(table, {name: allowed_widths(table, name, max_layer_ratio)[0] for name in table.widths})


@dataclass(frozen=True, slots=True)
class MeasuredCut:
    """A measured cut, as fractions of the uncut model's times, 0..1."""

    requested: float
    """Requested fraction of the layers' time."""
    predicted: float
    """Fraction of the layers' time at the chosen widths, by the table."""
    measured: float
    """Measured fraction of the whole model's time: 1 / speedup."""


def next_target(history: Sequence[MeasuredCut], target: float) -> float:
    """Return the next fraction of the layers' time to request, so that the whole model takes `target` of its time.

    Secant method: the uncut model is a known point (all of the layers' time is all of the model's), and the line
    through the two points next to the target (the closest that reaches it and the closest that misses it; else the two
    closest) gives the next value. It stays strictly between a cut that missed and one that reached it, and is never
    below half of the previous one, however steep the line.

    Args:
        history: the cuts so far, in any order.
        target: fraction of the whole model's time, below 1: 1 / wanted speedup.

    Returns:
        A fraction in [0.01, 1], for `choose_widths`.
    """
    goal = target * (1 - TARGET_MARGIN)
    if not history:
        return _bounded(goal)
    points = [(1.0, 1.0), *((aim.predicted, aim.measured) for aim in history)]
    miss = min(point for point in points if point[1] > target)
    reached = [point for point in points if point[1] <= target and point[0] < miss[0]]
    if reached:
        closest = max(reached)
        span = miss[0] - closest[0]
        return _bounded(min(max(_on_line(miss, closest, goal), closest[0] + 0.1 * span), miss[0] - 0.1 * span))
    nearest, next_to = sorted(points, key=lambda point: abs(point[1] - goal))[:2]
    aim = _on_line(next_to, nearest, goal)
    last = min(aim.requested for aim in history)
    return _bounded(min(max(aim, MIN_STEP_RATIO * min(last, miss[0])), 0.98 * miss[0]))


def unreachable_target(reason: str, best: str) -> TechniqueError:
    """Return the error for a target that no widths reach, with the best possible value."""
    return TechniqueError(
        "pruning cannot reach the latency target",
        f"{reason}; {best}",
        "lower the target, raise max_layer_ratio, or prune less and then quantize the result: `omgoptim quantize`",
    )


def _on_line(a: tuple[float, float], b: tuple[float, float], goal: float) -> float:
    """Return where the line through two (predicted, measured) points meets `goal`; proportional to `b` if flat."""
    rise = (a[1] - b[1]) / (a[0] - b[0]) if a[0] != b[0] else 0.0
    if rise <= 0:
        return b[0] * goal / b[1]
    return b[0] + (goal - b[1]) / rise


def _bounded(fraction: float) -> float:
    return min(max(fraction, MIN_FRACTION), MAX_FRACTION)


def _at_or_above(sizes: Sequence[int], size: int) -> int:
    """Return the index of the first of ascending `sizes` that is no smaller; the last if all are."""
    return min(bisect_left(sizes, size), len(sizes) - 1)


def step_edges(times: Mapping[int, float], candidates: Sequence[int], tolerance: float = MIN_RISE) -> tuple[int, ...]:
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


def tile_size_of(times: Mapping[int, float]) -> int:
    """Return the tile size that best explains how time rises with width; 8 if none is clear.

    For each block b, time is fitted as `a + c * ceil(width / b)`; a block is believed when it leaves less than half
    of the squared error of a straight line in the width, the largest such one that is no worse than another's.

    Args:
        times: width to time, in any unit: also widths between multiples of the tile sizes.
    """
    widths = np.array(sorted(times), dtype=float)
    values = np.array([times[int(width)] for width in widths])
    line = _residual(widths, values)
    if line <= 1e-9 * float(values.var() * len(values)):  # no stairs at all, or no rise
        return DEFAULT_TILE_SIZE
    errors = {block: _residual(np.ceil(widths / block), values) for block in TILE_SIZES}
    best = min(errors, key=lambda block: (errors[block], -block))
    return best if errors[best] < MAX_RESIDUAL_RATIO * line else DEFAULT_TILE_SIZE


def _residual(
    steps: np.ndarray[tuple[int], np.dtype[np.float64]], values: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> float:
    """Return the residual sum of squares of a linear fit of `values` to `steps`."""
    design = np.stack([np.ones_like(steps), steps], axis=1)
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(((values - design @ solution) ** 2).sum())
