"""Forms in which data sets write labels, and their common form: class indices, or numbers. No torch unless loaded.

BCEWithLogitsLoss takes 0 and 1 as floats, soft cross-entropy one-hot rows, margin losses -1 and 1: all name classes.
Data for causal language models gives labels equal to the input, and the model's own loss shifts them by one. Here they
are shifted once, when the data is read, so that every metric and loss sees the next token as the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError

IGNORED = -100
"""Label of targets that do not count: the default `ignore_index` of torch.nn.CrossEntropyLoss."""

MIN_LABELS = 8
"""Labels from which a form other than class indices is concluded: of three classes, eight labels are all below 2 in 4 %
of draws."""

LabelForm = Literal["index", "whole", "one_hot", "binary", "signed", "count"]

EVIDENCE: dict[LabelForm, str] = {
    "index": "integer labels fit its shape",
    "whole": "labels that are whole numbers fit its shape",
    "one_hot": "one-hot labels fit its shape",
    "binary": "0/1 labels fit its shape",
    "signed": "-1/1 labels fit its shape",
    "count": "",
}


def label_form(targets: Sequence[NDArray[Any]]) -> LabelForm:
    """Return the form of numeric labels, from the targets of several batches; `index` where there is no other sign."""
    flat = np.concatenate([target.ravel() for target in targets])
    values = {float(value) for value in np.unique(flat)} - {IGNORED}
    if len(flat) < MIN_LABELS or len(values) != 2:
        return "index"
    if values == {-1.0, 1.0}:
        return "signed"
    if values != {0.0, 1.0}:
        return "index"
    if all(target.ndim > 1 and target.shape[1] > 1 and bool((target.sum(1) == 1).all()) for target in targets):
        return "one_hot"
    return "binary" if flat.dtype.kind == "f" else "index"


def plain_labels(target: Any, form: LabelForm) -> Any:
    """Return labels as class indices (int64), of form `count` as numbers (float32), of form `index` as they are.

    Args:
        target: an array or a tensor; what is neither is returned as it is.
        form: of `label_form`.
    """
    if form == "index" or not hasattr(target, "argmax"):
        return target
    if form == "count":
        return target.astype(np.float32) if isinstance(target, np.ndarray) else target.float()
    if form == "one_hot":
        return target.argmax(1)
    plain = target if form == "whole" else target > (0.0 if form == "signed" else 0.5)
    labels = plain.astype(np.int64) if isinstance(plain, np.ndarray) else plain.long()
    if form in ("binary", "signed"):
        labels[target == IGNORED] = IGNORED
    return labels


def refuse_out_of_range(labels: Any, classes: int) -> None:
    """Raise a DataError if a class index is none of the classes, -100 apart."""
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} is out of range",
            f"the model has {classes} classes, so labels must be 0 to {classes - 1}, or -100 to be ignored",
            "check the labels of the data, or the number of outputs of the model",
        )


def shifted(labels: Any) -> Any:
    """Shift labels (B, T), an array or a tensor, to the next token; -100 at the last position."""
    if not hasattr(labels, "detach"):
        array = np.asarray(labels)
        return np.concatenate([array[:, 1:], np.full_like(array[:, :1], IGNORED)], 1)
    import torch

    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


def predicts_next_token(
    inputs: Mapping[str, NDArray[Any]], labels: Any, run: Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]
) -> bool:
    """Return whether to shift labels: they repeat an integer input, and no score depends on a later token.

    Args:
        inputs: one batch by name.
        labels: its labels, or any other target.
        run: the model's outputs for a batch, the scores (B, T, V) first.
    """
    if hasattr(labels, "detach"):  # a tensor
        labels = labels.numpy()
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        return False
    counted = labels != IGNORED
    name = next(
        (
            name
            for name, array in inputs.items()
            if np.issubdtype(array.dtype, np.integer)
            and array.shape == labels.shape
            and (array == labels)[counted].all()
        ),
        None,
    )
    if name is None or labels.shape[1] < 2 or not counted[:, 1:].any() or (labels[counted] == labels[counted][0]).all():
        return False
    scores = run(inputs)[0]
    if scores.ndim != 3 or scores.shape[:2] != labels.shape or not np.issubdtype(scores.dtype, np.floating):
        return False
    other = inputs[name].copy()
    other[:, -1] = np.where(other[:, -1] == other[:, 0], other[:, -2], other[:, 0])
    again = run({**inputs, name: other})[0]
    return bool(np.allclose(scores[:, :-1], again[:, :-1], rtol=1e-3, atol=1e-4))
