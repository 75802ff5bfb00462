"""Agreement of a model's outputs with the original's: per output, and the worst of them.

Class scores agree where the same class has the largest score. Numbers, values and states agree by 1 - (relative
error)^2, the share of the original's variance over samples that is kept: the coefficient of determination (R^2) with
the original's outputs as the truth. The relative error is the root mean square of the difference over that of the
original about its mean. Integers agree where they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError, argument
from omgoptim.models.outputs import Arrays, ModelOutputs, OutputSpec, RunningMoments, as_rows, slice_sums, small_slices

RUINED_ERROR = 0.5
"""Relative error above which an output counts as ruined. Chosen: a quarter of its variance is lost (R^2 below 0.75)."""

RUINED_AGREEMENT = 0.5
"""Fraction of equal classes or integers below which an output counts as ruined. Chosen: most predictions differ."""

RUINED_PART = 0.9
"""Relative error above which entries of a far smaller scale count as ruined. Chosen: close to predicting their mean."""


@dataclass(frozen=True, slots=True)
class OutputPart:
    """Entries of an output of a far smaller scale than the others, such as the scores beside boxes in pixels."""

    axis: int
    """With the batch as axis 0."""
    first: int
    last: int
    relative_error: float
    count: int = 0
    """Entries among `first` to `last` of the smaller scale; 0: all."""


@dataclass(frozen=True, slots=True)
class OutputAgreement:
    """Agreement of one output with the original's, over all samples."""

    spec: OutputSpec
    agreement: float
    """By `spec.compared_by`: 1 where both are the same. R^2 has no lower bound; 0 is that of always giving the mean."""
    relative_error: float | None = None
    """Relative error of floating outputs other than class scores."""
    cosine: float | None = None
    """Mean over samples, of outputs that are vectors; nothing is judged by it unless the metric is cosine."""
    read: bool = True
    """The metric reads this output."""
    ruined_part: OutputPart | None = None
    """Entries of a far smaller scale that are ruined, which no error of the whole output shows."""

    @property
    def lost(self) -> bool:
        """Return whether the output is ruined, in whole or in part, and the metric does not read it."""
        return self.ruined_part is not None or (self.ruined and not self.read)

    @property
    def ruined(self) -> bool:
        """Return whether its error, or that of a part, exceeds the limit."""
        if self.ruined_part is not None:
            return True
        if self.relative_error is not None:
            return self.relative_error > RUINED_ERROR
        return self.agreement < RUINED_AGREEMENT


@dataclass(frozen=True, slots=True)
class _Scores:
    """Agreement of one output per sample."""

    per_sample: NDArray[np.float64]
    relative_error: float | None = None
    part: OutputPart | None = None
    """Entries of a far smaller scale."""


def output_agreements(
    outputs: ModelOutputs,
    candidate: Sequence[Arrays],
    original: Sequence[Arrays],
    reads: frozenset[int] = frozenset(),
    reported_in_full: frozenset[int] = frozenset(),
) -> tuple[OutputAgreement, ...]:
    """Compute the agreement of each compared output.

    Args:
        outputs: description of the outputs.
        candidate: per batch the flat list of outputs.
        original: the same of the original, for the same samples.
        reads: indices of the outputs that the metric reads.
        reported_in_full: indices of the outputs that a metric of the user reads: it may know which entries matter.

    Raises:
        DataError: an output is missing, or infinite where the original's is not.
    """
    found = []
    for spec in outputs.compared:
        scores = _scores(spec, candidate, original)
        cosine = float(cosines(spec, candidate, original).mean()) if spec.is_vector else None
        mean = float(scores.per_sample.mean())
        part = scores.part if spec.index not in reported_in_full else None
        ruined = part if part is not None and part.relative_error > RUINED_PART else None
        found.append(OutputAgreement(spec, mean, scores.relative_error, cosine, spec.index in reads, ruined))
    return tuple(found)


def relative_errors(outputs: ModelOutputs, candidate: Sequence[Arrays], original: Sequence[Arrays]) -> list[float]:
    """Compute the relative error of each compared floating output, of class scores as of any other values.

    Raises:
        DataError: an output is missing, or infinite where the original's is not.
    """
    floating = [replace(spec, kind="values") for spec in outputs.compared if spec.kind != "integers"]
    errors = [_scores(spec, candidate, original).relative_error for spec in floating]
    return [error for error in errors if error is not None]


def worst_scores(
    outputs: ModelOutputs,
    candidate: Sequence[Arrays],
    original: Sequence[Arrays],
    cosine: bool = False,
    only: frozenset[int] | None = None,
) -> NDArray[np.float64]:
    """Compute the agreement of each sample on the output with the lowest mean agreement.

    Args:
        outputs: description of the outputs.
        candidate: per batch the flat list of outputs.
        original: the same of the original, for the same samples.
        cosine: compare by cosine, on the outputs where it is defined.
        only: indices of the outputs to compare; default: all compared outputs.
    """
    if cosine:
        every = [(spec, cosines(spec, candidate, original)) for spec in cosine_outputs(outputs)]
    else:
        compared = [spec for spec in outputs.compared if only is None or spec.index in only]
        every = [(spec, _scores(spec, candidate, original).per_sample) for spec in compared]
    spec, worst = min(every, key=lambda entry: float(entry[1].mean()))
    return worst if spec.batch_axis is not None else np.repeat(worst, _sizes(outputs, original))


def _sizes(outputs: ModelOutputs, original: Sequence[Arrays]) -> list[int]:
    """Return the samples in each batch; 1 if no output has a batch axis."""
    batched = next((spec for spec in outputs.specs if spec.batch_axis is not None), None)
    if batched is None:
        return [1 for _ in original]
    return [int(batch[batched.index].shape[batched.batch_axis or 0]) for batch in original]


def cosine_outputs(outputs: ModelOutputs) -> list[OutputSpec]:
    """Return the outputs with a defined cosine.

    Raises:
        DataError: there is none: the cosine of a single number is its sign, and that of a constant is always 1.
    """
    found = [spec for spec in outputs.compared if spec.is_vector]
    if not found:
        shown = ", ".join(f"{spec.name} ({spec.kind})" for spec in outputs.compared)
        raise DataError(
            "cosine similarity is not meaningful for any output of the model",
            f"it is only the sign of a single number, and always 1 for constant outputs; the outputs are: {shown}",
            "use metric auto, which compares single numbers by their error",
        )
    return found


def _scores(spec: OutputSpec, candidate: Sequence[Arrays], original: Sequence[Arrays]) -> _Scores:
    """Compute the agreement of each sample on one output; of each batch without a batch axis."""
    if len(candidate[0]) <= spec.index:
        raise DataError(
            f"output '{spec.name}' of the original is missing",
            f"the compressed model returns {len(candidate[0])} outputs",
            f"let the model return the same outputs, or ignore this one: {argument('ignore_outputs', [spec.name])}",
        )
    if spec.kind in ("class_scores", "integers"):
        equal = [_equal(spec, m[spec.index], o[spec.index]) for m, o in zip(candidate, original, strict=True)]
        return _Scores(np.concatenate(equal))
    squared, moments = [], RunningMoments.over(spec.shape, spec.batch_axis, spec.dtype)
    by_entry: NDArray[np.float64] | float = 0.0
    for batch, reference in zip(candidate, original, strict=True):
        array, truth = batch[spec.index], reference[spec.index]
        moments.add(truth)
        rows = _squared_differences(spec, array, truth)
        squared.append(rows.mean(1) if rows.shape[1] else np.zeros(len(rows)))
        if rows.shape[1] == moments.width:
            by_entry = by_entry + rows.sum(0)
    errors = np.concatenate(squared) / moments.scale**2
    errors = np.where(np.isnan(errors), 1.0, errors)  # another size: scored as predicting the mean
    part = small_part(spec, moments.squares, np.asarray(by_entry))
    return _Scores(1 - errors, math.sqrt(float(errors.mean())), part)


def _squared_differences(spec: OutputSpec, candidate: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the squared differences, one row a sample; NaN if the sizes differ."""
    if candidate.shape != truth.shape:
        count = 1 if spec.batch_axis is None else truth.shape[spec.batch_axis]
        return np.full((count, 1), np.nan)
    a, b = _finite_rows(spec, candidate, truth)
    return np.asarray((a - b) ** 2)


def small_part(spec: OutputSpec, squares: NDArray[np.float64], errors: NDArray[np.float64]) -> OutputPart | None:
    """Return the entries of a far smaller scale along one axis, with their own relative error; None without any.

    The error of a whole output is that of its largest entries: of boxes in pixels and scores in 0..1 in one tensor it
    stays small where every score is lost.

    Args:
        spec: the output.
        squares: squared differences of the original from its mean, summed over samples, for each entry of a sample.
        errors: squared differences of the candidate from the original, in the same form.
    """
    if squares.shape != errors.shape:
        return None
    found = []
    of_errors = slice_sums(spec.shape, spec.batch_axis, errors)
    for axis, spreads in slice_sums(spec.shape, spec.batch_axis, squares).items():
        small = small_slices(spreads)
        if small is not None:
            error = math.sqrt(float(of_errors[axis][small].sum() / spreads[small].sum()))
            found.append(OutputPart(axis, int(small[0]), int(small[-1]), error, len(small)))
    return max(found, key=lambda part: part.relative_error, default=None)


def _finite_rows(
    spec: OutputSpec, candidate: NDArray[Any], truth: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both as rows, with 0 where both have the same infinity, as masks do.

    Raises:
        DataError: another value is not finite.
    """
    a, b = as_rows(candidate, spec.batch_axis), as_rows(truth, spec.batch_axis)
    same = np.isinf(a) & (a == b)
    a, b = np.where(same, 0.0, a), np.where(same, 0.0, b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError(
            f"output '{spec.name}' is infinite where the original's is finite, or the reverse",
            "no relative error can be computed from an infinite difference",
            "return large finite values instead of inf, or ignore the output: "
            f"{argument('ignore_outputs', [spec.name])}",
        )
    return a, b


def _equal(spec: OutputSpec, candidate: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the fraction of equal classes or integers of each sample."""
    if candidate.shape != truth.shape:
        return np.zeros(1 if spec.batch_axis is None else truth.shape[spec.batch_axis])
    if spec.kind == "class_scores":
        candidate, truth = predicted_classes(spec, candidate), predicted_classes(spec, truth)
    equal = candidate == truth
    if spec.batch_axis is None:
        return np.array([equal.mean() if equal.size else 1.0])
    rows = as_rows(equal, spec.batch_axis)
    return rows.mean(1) if rows.shape[1] else np.ones(len(rows))


def predicted_classes(spec: OutputSpec, scores: NDArray[Any]) -> NDArray[Any]:
    """Return the class of each row of scores."""
    if spec.class_axis is None:
        return np.asarray(scores > (0.5 if spec.probabilities else 0.0))
    return np.asarray(scores.argmax(spec.class_axis))


def cosines(spec: OutputSpec, candidate: Sequence[Arrays], original: Sequence[Arrays]) -> NDArray[np.float64]:
    """Compute the cosine of each sample's whole output with the original's; 1 if both are zero, 0 if one is."""
    found = []
    for batch, reference in zip(candidate, original, strict=True):
        if batch[spec.index].shape != reference[spec.index].shape:
            found.append(np.zeros(1 if spec.batch_axis is None else reference[spec.index].shape[spec.batch_axis]))
            continue
        a, b = _finite_rows(spec, batch[spec.index], reference[spec.index])
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        both_zero = (np.abs(a).sum(1) == 0) & (np.abs(b).sum(1) == 0)
        cosine = (a * b).sum(1) / np.where(lengths > 0, lengths, 1.0)
        found.append(np.where(both_zero, 1.0, np.minimum(cosine, 1.0)))
    return np.concatenate(found)
