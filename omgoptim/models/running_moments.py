"""Running moments of an output over samples, batch by batch, for outputs that exceed the memory. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6
"""Root mean square about the mean, over that about zero, at which an output is constant: the rounding of float32."""


@dataclass(slots=True)
class RunningMoments:
    """Mean and variance of each entry of an output over samples, merged batch by batch (Chan et al. 1979)."""

    width: int
    """Entries that have a mean of their own."""
    batch_axis: int | None = 0
    count: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Sums of squared differences from the mean."""

    @staticmethod
    def over(shape: Sequence[int | str], batch_axis: int | None, dtype: str = "float32") -> RunningMoments:
        """Create the moments for outputs of a shape.

        Each entry of a sample has a mean of its own if samples have one size; else each entry of the last dimension;
        else there is one mean for all.
        """
        own = [size for axis, size in enumerate(shape) if axis != batch_axis]
        parts = 2 if dtype.startswith("complex") else 1
        if all(isinstance(size, int) for size in own):
            return RunningMoments(parts * math.prod(size for size in own if isinstance(size, int)), batch_axis)
        return RunningMoments(parts * own[-1] if isinstance(own[-1], int) else 1, batch_axis)

    def add(self, array: NDArray[Any]) -> None:
        """Add the outputs of one batch; values that are not finite count as 0."""
        rows = as_rows(array, self.batch_axis)
        if not rows.size:
            return
        if rows.size % self.width:
            self._merge_all()
        rows = np.where(np.isfinite(rows), rows, 0.0).reshape(-1, self.width)
        count, mean = len(rows), rows.mean(0)
        squares = ((rows - mean) ** 2).sum(0)
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, difference = self.count + count, mean - self.mean
        self.squares = self.squares + squares + difference**2 * self.count * count / total
        self.mean = self.mean + difference * count / total
        self.count = total

    def _merge_all(self) -> None:
        """Continue with one mean for all entries: samples have several sizes."""
        if self.count:
            between = self.count * float(((self.mean - self.mean.mean()) ** 2).sum())
            self.squares = np.array([float(self.squares.sum()) + between])
            self.mean = np.array([float(self.mean.mean())])
        self.count, self.width = self.count * self.width, 1

    @property
    def rms(self) -> float:
        """Return the root mean square about zero."""
        if not self.count:
            return 0.0
        return math.sqrt(float((self.squares / self.count + self.mean**2).mean()))

    @property
    def spread(self) -> float:
        """Return the root mean square about the means; of a single sample about its own mean."""
        if self.count > 1:
            return math.sqrt(float(self.squares.mean()) / (self.count - 1))
        return float(self.mean.std()) if self.width > 1 else 0.0

    @property
    def constant(self) -> bool:
        """Return whether the output is constant up to rounding."""
        return self.spread <= ROUNDING * self.rms

    @property
    def scale(self) -> float:
        """Return the scale of differences: the spread; of a constant output its size, or 1 if it is zero."""
        return (self.rms or 1.0) if self.constant else self.spread


def as_rows(array: NDArray[Any], batch_axis: int | None) -> NDArray[np.float64]:
    """Return one row per sample in float64, a complex number as two entries; one row in all without a batch axis."""
    if np.iscomplexobj(array):
        array = np.stack([array.real, array.imag], -1)
    if batch_axis is None:
        return array.reshape(1, -1).astype(np.float64)
    moved = np.moveaxis(array, batch_axis, 0)
    return moved.reshape(len(moved), math.prod(moved.shape[1:])).astype(np.float64)
