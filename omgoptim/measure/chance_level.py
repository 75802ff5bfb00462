"""Tests of what a quality can mean: the original model at chance level, data with few of the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from omgoptim.models.labels import IGNORED, label_form, plain_labels
from omgoptim.models.outputs import ModelOutputs

ABOVE_CHANCE = 0.99
"""Accuracy above this is never at chance level, even if almost all labels are the same."""

FEW_CLASSES = 0.5
"""Fraction of the expected number of classes up to which data is said to hold few."""


def chance_level_reason(metric: str, value: float | None, targets: Sequence[Any]) -> str | None:
    """Return a sentence if a quality is at chance level; None if it is better, or unknown.

    Accuracy is compared with that of the most frequent class, plus two standard errors for the number of samples; r2
    with 0, that of the mean of the targets.

    Args:
        metric: name of the metric, as a report has it.
        value: of the original model on these targets.
        targets: per batch; -100 is ignored.

    >>> chance_level_reason("r2", -0.2, [])
    'the original model is at chance level: its r2 is -0.2000, and the mean of the targets alone gives 0'
    """
    if value is None or not math.isfinite(value):
        return None
    if metric == "r2":
        if value > 0:
            return None
        return (
            f"the original model is at chance level: its r2 is {value:.4f}, and the mean of the targets alone gives 0"
        )
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
        f"the original model is at chance level: its accuracy is {value:.4f}, and the most frequent class "
        f"alone gives {most_frequent:.4f} ({joined.size:,} labels)"
    )


def chance_level_summary(metric: str | None, value: float | None, targets: Sequence[Any]) -> str:
    """Return the first sentences of a summary if the original is at chance level; else none."""
    why = chance_level_reason(metric, value, targets) if metric else None
    if why is None:
        return ""
    return f"{why[0].upper()}{why[1:]}. Its data, weights or metric are likely wrong, and the numbers mean little."


def missing_classes_notes(outputs: ModelOutputs, targets: Sequence[Any]) -> list[str]:
    """Return a note if labels of one class a sample name less than half of the classes that so many samples would.

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
        f"the {joined.size:,} evaluation samples hold {found} of {classes:,} classes: if the data is sorted by class, "
        "shuffle it where it is loaded, since only its first samples are used"
    ]
