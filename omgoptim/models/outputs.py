"""Description of a model's outputs: kind, comparison with the original, statistics, and the labels' output. No torch.

`output_detection` detects them once, from the original's outputs for samples that are not evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError, RequestError, argument, did_you_mean
from omgoptim.models.labels import LabelForm

Arrays = list[NDArray[Any]]
OutputKind = Literal["class_scores", "number", "values", "state", "integers"]
ComparedBy = Literal["top1_agreement", "r2_agreement", "exact_agreement", "not compared"]
Labels = Literal["none", "classes", "values", "other"]

COMPARED_BY: dict[OutputKind, ComparedBy] = {
    "class_scores": "top1_agreement",
    "number": "r2_agreement",
    "values": "r2_agreement",
    "state": "r2_agreement",
    "integers": "exact_agreement",
}
"""Measure of agreement for each kind of output."""


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """An output of a model."""

    name: str
    index: int
    """Position in the flat list of outputs."""
    shape: tuple[int | str, ...]
    """Sizes, or the names of dynamic dimensions (`"batch"`)."""
    dtype: str
    kind: OutputKind
    evidence: str
    """Evidence for its kind, as text."""
    batch_axis: int | None = 0
    """None where no dimension is the batch: then a batch counts as one sample."""
    class_axis: int | None = None
    """Class axis of class scores, 1 or -1; None for a single score per target, a logit or a probability."""
    probabilities: bool = False
    """Class scores after a softmax or a sigmoid."""
    weight: float = 1.0
    """Weight in the agreement and in the distillation loss; 0: left out."""
    spread: float = 1.0
    """Scale of floating outputs: root mean square about the mean on the reference samples, or about 0 if constant."""
    constant: bool = False
    """Equal for every reference sample."""
    scales: EntryScales | None = None
    """Where entries are of far different scales: the spread of each, by which training weighs them."""

    @property
    def compared_by(self) -> ComparedBy:
        """Return the name of its agreement with the original."""
        return COMPARED_BY[self.kind] if self.weight else "not compared"

    @property
    def is_vector(self) -> bool:
        """Return whether a cosine is defined: floating, several entries per sample, not constant."""
        floating = self.kind in ("class_scores", "values", "state")
        return floating and not self.constant and any(size != 1 for size in sample_shape(self.shape, self.batch_axis))


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """All outputs of a model, and the output of the labels."""

    specs: tuple[OutputSpec, ...]
    labels: Labels = "none"
    target: int | None = None
    """Index of the output that the labels belong to; None without labels, or where it is not known."""
    fitting: tuple[int, ...] = ()
    """The outputs that the labels fit by their shape."""
    label_shape: tuple[int, ...] = ()
    """Shape of the first batch's labels."""
    label_form: LabelForm = "index"
    """Form of the data's labels; `plain_labels` gives class indices or numbers."""

    @property
    def compared(self) -> tuple[OutputSpec, ...]:
        """Return the outputs whose weight is not zero."""
        return tuple(spec for spec in self.specs if spec.weight)

    @property
    def labelled(self) -> OutputSpec | None:
        """Return the output that the labels belong to; None if it is unknown."""
        return None if self.target is None else self.specs[self.target]

    def require_target(self, fix: str = "") -> OutputSpec:
        """Return the output that the labels belong to, or raise.

        Args:
            fix: what else can be done than naming the output.

        Raises:
            DataError: no output fits the labels, or several do.
        """
        if self.target is not None:
            return self.specs[self.target]
        shown = "; ".join(f"{spec.name} has shape ({', '.join(map(str, spec.shape))})" for spec in self.specs)
        kind = {"classes": "integer", "values": "float"}.get(self.labels, "")
        if len(self.fitting) > 1:
            names = [self.specs[index].name for index in self.fitting]
            likely = next((name for name in reversed(names) if "aux" not in name), names[-1])  # scores follow boxes
            raise DataError(
                "the labels fit the shapes of several outputs of the model",
                f"{kind} labels of shape {self.label_shape} fit {', '.join(names)} ({shown})",
                f"name the output that they are for: {argument('target_output', likely)}"
                + (f", or {fix}" if fix else ""),
            )
        raise DataError(
            "the targets do not fit the outputs",
            f"{kind} targets have shape {self.label_shape}; {shown}".strip(),
            fix or f"give your own metric: {argument('metric', 'file.py:callable')}",
        )


def output_index(name: str, names: Sequence[str]) -> int:
    """Return the index of the output that a user gives by name or position.

    Raises:
        RequestError: there is none.
    """
    if name in names:
        return list(names).index(name)
    if re.fullmatch(r"-?\d+", name) and -len(names) <= int(name) < len(names):
        return int(name) % len(names)
    raise RequestError(
        f"the model has no output '{name}'",
        f"{did_you_mean(name, names)} By position: {', '.join(map(str, range(len(names))))}.",
        "give the name or the index of an output",
    )


def class_layout(shape: Sequence[int], target_shape: Sequence[int]) -> tuple[int | None, int] | None:
    """Infer the layout of class scores in an output from its shape and that of the targets.

    Args:
        shape: of the output, the batch first: (N, C), (N, C, …) or (N, …, C); a single score per target is (N), (N, 1)
            or of the targets' own shape.
        target_shape: of the integer targets, the batch first.

    Returns:
        The class axis (1, -1, or None for single scores) and the number of classes; None if labels of `target_shape`
        do not fit.
    """
    shape, target = tuple(shape), tuple(target_shape)
    if not shape or not target or shape[0] != target[0]:
        return None
    single = len(shape) < 2 or 1 in (shape[1], shape[-1])
    if shape == target or (math.prod(shape) == math.prod(target) and single):
        return None, 2
    if shape[:-1] == target:
        return -1, shape[-1]
    if len(shape) == len(target) + 1 and shape[:1] + shape[2:] == target:
        return 1, shape[1]  # class dimension second, as cross_entropy takes it
    return None


def sample_shape(shape: Sequence[int | str], batch_axis: int | None) -> list[int | str]:
    """Return the dimensions of one sample."""
    return [size for axis, size in enumerate(shape) if axis != batch_axis]


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
        sizes = [size for axis, size in enumerate(shape) if axis != batch_axis]
        parts = 2 if dtype.startswith("complex") else 1
        if all(isinstance(size, int) for size in sizes):
            return RunningMoments(parts * math.prod(size for size in sizes if isinstance(size, int)), batch_axis)
        return RunningMoments(parts * sizes[-1] if isinstance(sizes[-1], int) else 1, batch_axis)

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
