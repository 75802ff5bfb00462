"""Checks that the original model's numbers mean something: chance level, and dependence on the batch.

Causes of batch dependence are batch statistics in eval mode, a branch on values of the whole batch
(`if x.mean() > 0`), and padding to the batch's longest sample. Then a quality holds for one batch size only, and an
exported program, which has one branch, is correct for some batches only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.models.forward import NamedBatch
from omgoptim.models.labels import IGNORED, label_form, plain_labels
from omgoptim.models.outputs import ModelOutputs
from omgoptim.models.samples import Samples, batch_length

ABOVE_CHANCE = 0.99
"""Accuracy above this is never at chance level, even if almost all labels are equal. Chosen: few sets are so uneven."""

FEW_CLASSES = 0.5
"""Fraction of the expected number of classes up to which data is said to cover few. Chosen: random draws exceed it."""

MAX_SAMPLES = 32
"""Limit of the samples of the test. Chosen by time: it runs each of them alone."""

MIN_SAMPLES, TIME_LIMIT_S = 8, 3.0
"""Samples that always run, and the time limit in seconds for the others. Chosen: a slow model is checked on fewer."""

TOLERANCE, COARSE = 1e-3, 5e-2
"""Differences up to this fraction of an output's scale are rounding, of float32 and half precision."""

OFFSET = 1e-2
"""Least scale of a float32 output over its largest value. Chosen: rounding grows with values, not their spread."""

Run = Callable[[NamedBatch], Sequence[NDArray[Any]]]


def chance_level_reason(metric: str, value: float | None, targets: Sequence[Any]) -> str | None:
    """Return a sentence if a quality is at chance level; None if it is better, or unknown.

    Accuracy is compared with that of the most frequent class, plus two standard errors for the number of samples; r2
    with 0, that of the mean of the targets.

    Args:
        metric: name of the metric, as a report has it.
        value: of the original model on these targets.
        targets: per batch; -100 is ignored.

    >>> chance_level_reason("r2", -0.2, [])
    'the original model is at chance level: its r2 is -0.2000, and predicting the mean target gives 0'
    """
    if value is None or not math.isfinite(value):
        return None
    if metric == "r2":
        if value > 0:
            return None
        return f"the original model is at chance level: its r2 is {value:.4f}, and predicting the mean target gives 0"
    if metric != "top1_accuracy" or value >= ABOVE_CHANCE:
        return None
    labels = [np.asarray(target) for target in targets if target is not None]
    if not labels or any(each.dtype.kind not in "iuf" for each in labels):
        return None
    form = label_form(labels)
    joined = np.concatenate([plain_labels(each, form).ravel() for each in labels])
    joined = joined[joined != IGNORED]
    if not joined.size:
        return None
    most_frequent = float(np.unique(joined, return_counts=True)[1].max()) / joined.size
    if value > most_frequent + 2 * math.sqrt(most_frequent * (1 - most_frequent) / joined.size):
        return None
    return (
        f"the original model is at chance level: its accuracy is {value:.4f}, and always predicting "
        f"the most frequent class gives {most_frequent:.4f} ({joined.size:,} labels)"
    )


def chance_level_summary(metric: str | None, value: float | None, targets: Sequence[Any]) -> str:
    """Return the first sentences of a summary if the original is at chance level; else none."""
    why = chance_level_reason(metric, value, targets) if metric else None
    if why is None:
        return ""
    return f"{why[0].upper()}{why[1:]}. The data, weights or metric are probably wrong, and the results not meaningful."


def missing_classes_notes(outputs: ModelOutputs, targets: Sequence[Any]) -> list[str]:
    """Return a note if class labels cover less than half of the classes expected of so many samples.

    Uniform classes are expected: n samples of C classes name C (1 - (1 - 1 / C)^n) of them.

    Args:
        outputs: of the original, with the output of the labels.
        targets: per batch; -100 is ignored.
    """
    spec = outputs.labelled
    arrays = [np.asarray(target) for target in targets if target is not None]
    if spec is None or outputs.labels != "classes" or not arrays:
        return []
    labels = [np.asarray(plain_labels(array, outputs.label_form)) for array in arrays]
    classes = 2 if spec.class_axis is None else spec.shape[spec.class_axis]
    if any(each.ndim != 1 for each in labels) or not isinstance(classes, int):
        return []
    joined = np.concatenate(labels)
    joined = joined[joined != IGNORED]
    found = len(np.unique(joined))
    if not joined.size or found > FEW_CLASSES * classes * (1 - (1 - 1 / classes) ** joined.size):
        return []
    return [
        f"the {joined.size:,} evaluation samples cover {found} of {classes:,} classes: if the data is sorted by class, "
        "shuffle it in the data callable, since only its first samples are used"
    ]


def batch_dependence(run: Run, samples: Samples, cause: str = "", coarse: bool = False) -> str | None:
    """Compare the outputs of samples in one batch with those of the same samples one by one.

    Args:
        run: returns a model's output arrays for a batch; an exception counts as no result.
        samples: at least two.
        cause: a known cause, for the sentence.
        coarse: whether the model computes in half precision.

    Returns:
        A sentence with the number of samples and the largest difference; None if the outputs are the same, no
        two samples have one shape, or the model does not accept both batch sizes.
    """
    batch = _joined(samples)
    if batch is None:
        return None
    size, began = batch_length(batch), time.monotonic()
    singles: list[Sequence[NDArray[Any]]] = []
    try:
        together = run(batch)
        for row in range(size):
            if row >= MIN_SAMPLES and time.monotonic() - began > TIME_LIMIT_S:
                break
            singles.append(run({name: array[row : row + 1] for name, array in batch.items()}))
    except Exception:  # noqa: BLE001 - a batch size that the model does not take gives no result
        return None
    pairs = next((a.shape for a, b in zip(together, singles[0], strict=False) if _is_of_pairs(a, b, size)), None)
    if pairs is not None:
        return (
            f"an output has entries for every pair of samples of its batch (shape {pairs} for {size} samples), so its "
            "size depends on the other samples"
        )
    scales = [_scale(output, coarse) for output in together]
    differences = [
        max((_difference(output, single[k], row, scales[k]) for k, output in enumerate(together)), default=0.0)
        for row, single in enumerate(singles)
    ]
    differing = [each for each in differences if each > (COARSE if coarse else TOLERANCE)]
    if not differing:
        return None
    return (
        f"the outputs for a sample depend on the other samples of its batch: {len(differing)} of {len(singles)} "
        f"samples have different outputs alone and in a batch of {size} (by up to {max(differing):.1%} of the "
        f"outputs' scale); possible cause: {cause or 'data-dependent control flow, or statistics over the batch'}"
    )


def _joined(samples: Samples) -> NamedBatch | None:
    """Join the first samples of one shape to a batch; None if there are no two."""
    if not samples.batches:
        return None
    shapes = {name: array.shape[1:] for name, array in samples.batches[0].items()}
    batches: list[NamedBatch] = []
    count = 0
    for batch in samples.batches:
        if count < MAX_SAMPLES and {name: array.shape[1:] for name, array in batch.items()} == shapes:
            batches.append({name: array[: MAX_SAMPLES - count] for name, array in batch.items()})
            count += batch_length(batches[-1])
    if count < 2:
        return None
    return {name: np.concatenate([batch[name] for batch in batches]) for name in shapes}


def _scale(many: NDArray[Any], coarse: bool) -> float:
    """Return the scale of a batch's output: its largest value, for float32 less what all values share."""
    finite = many[np.isfinite(many)] if many.dtype.kind in "fc" else many[:0]
    if not finite.size:
        return 1.0
    largest = float(np.abs(finite).max())
    deviation = largest if coarse else float(np.abs(finite - finite.mean()).max())
    return max(min(largest, deviation), OFFSET * largest, 1e-12)


def _is_of_pairs(batched: NDArray[Any], single: NDArray[Any], size: int) -> bool:
    """Return whether an output has the size of the batch in two dimensions, as a matrix of similarities has."""
    same_rank = zip(batched.shape, single.shape, strict=True) if batched.ndim == single.ndim else ()
    return sum(sizes == (size, 1) for sizes in same_rank) > 1


def _difference(batched: NDArray[Any], single: NDArray[Any], row: int, scale: float) -> float:
    """Return the largest difference of a sample's output, over the output's scale; 0 without a batch axis."""
    if batched.dtype.kind not in "fc" or batched.ndim != single.ndim:
        return 0.0
    differing = [axis for axis in range(batched.ndim) if batched.shape[axis] != single.shape[axis]]
    if len(differing) != 1 or single.shape[differing[0]] != 1 or not single.size:
        return 0.0
    if row >= batched.shape[differing[0]]:  # no batch axis: as many entries as values of the samples decide
        return 0.0
    in_batch, in_single = np.take(batched, [row], differing[0]), single
    finite = np.isfinite(in_batch) & np.isfinite(in_single)
    if not finite.any():
        return 0.0
    return float(np.abs(in_batch[finite] - in_single[finite]).max()) / scale
