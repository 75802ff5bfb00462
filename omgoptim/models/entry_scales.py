"""Entries of far different scales in one output, such as boxes in pixels beside scores in 0..1. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6
"""Root mean square about the mean, over that about zero, at which an output is constant: the rounding of float32."""

SCALE_GAP = 10.0
"""Ratio of neighbouring spreads from which entries of an output are of another scale. Chosen: boxes beside scores."""

MAX_SLICES, FEW_SLICES = 512, 16
"""Longest axis whose slices are compared; up to the second they need not be neighbours to be of one scale. Chosen:
among many slices some differ by chance."""


@dataclass(frozen=True, slots=True)
class EntryScales:
    """Spread of each slice along one axis, where slices are of far different scales."""

    axis: int
    """With the batch as axis 0."""
    values: tuple[float, ...]
    """For each slice the root mean square about the mean over all slices of its scale."""

    @staticmethod
    def of(
        shape: Sequence[int | str], batch_axis: int | None, squares: NDArray[np.float64], count: int
    ) -> EntryScales | None:
        """Return the scales along the axis where they differ most; None where all are of one scale.

        Args:
            shape: of the output; names stand for dynamic dimensions.
            batch_axis: only 0 is compared.
            squares: squared differences from the mean, summed over samples, for each entry of a sample.
            count: samples.
        """
        found = []
        for axis, sums in slice_sums(shape, batch_axis, squares).items():
            if small_slices(sums) is not None:
                of_each = np.sqrt(_pooled(sums) / max(count - 1, 1) / (squares.size / len(sums)))
                found.append(EntryScales(axis, tuple(map(float, of_each))))
        return max(found, key=lambda scales: max(scales.values) / min(scales.values), default=None)


def slice_sums(
    shape: Sequence[int | str], batch_axis: int | None, entries: NDArray[np.float64]
) -> dict[int, NDArray[np.float64]]:
    """Sum the values of a sample's entries over each slice, by axis; empty where samples have several sizes.

    Only axes that can hold quantities are compared: those of (N, C) and (N, T, C), the first after the batch of others,
    not height and width.
    """
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    if batch_axis != 0 or len(sizes) != len(shape) - 1 or entries.shape != (math.prod(sizes),):
        return {}
    sums = {}
    for axis in (0, 1)[: len(sizes) if len(sizes) < 3 else 1]:
        if 1 < sizes[axis] <= MAX_SLICES:
            others = tuple(other for other in range(len(sizes)) if other != axis)
            sums[axis + 1] = entries.reshape(sizes).sum(others)
    return sums


def small_slices(squares: NDArray[np.float64]) -> NDArray[np.intp] | None:
    """Return the indices of slices below the first gap in the sizes of their spreads, in order; None without one."""
    order = np.argsort(-squares)
    order = order[squares[order] > ROUNDING**2 * squares.max()]  # without constants
    gaps = np.flatnonzero(squares[order[:-1]] >= SCALE_GAP**2 * squares[order[1:]])
    if not gaps.size:
        return None
    large, small = order[: gaps[0] + 1], np.sort(order[gaps[0] + 1 :])
    apart = ((large > small[0]) & (large < small[-1])).any()
    return None if apart and len(squares) > FEW_SLICES else small


def _pooled(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace each slice's sum by the mean over the slices of its scale; constants take that of the largest."""
    pooled, remaining = np.empty_like(squares), np.arange(len(squares))
    varying = squares > ROUNDING**2 * squares.max()
    while True:
        small = small_slices(squares[remaining])
        large = remaining if small is None else np.delete(remaining, small)
        pooled[large] = squares[large][varying[large]].mean()
        if small is None:
            return pooled
        remaining = remaining[small]
