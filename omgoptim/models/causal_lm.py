"""Targets of causal language models: labels that repeat the input, shifted to the next token.

Data for such models gives `labels` equal to `input_ids`, and the model's own loss shifts them by one. Here they are
shifted once, when the data is read, so that every metric and loss sees the next token as the target of each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omgoptim.models.labels import IGNORED


def shifted(labels: Any) -> Any:
    """Shift labels (B, T), an array or a tensor, to the next token; -100 at the last position."""
    if isinstance(labels, torch.Tensor):
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    array = np.asarray(labels)
    return np.concatenate([array[:, 1:], np.full_like(array[:, :1], IGNORED)], 1)


def predicts_next_token(
    inputs: Mapping[str, NDArray[Any]],
    labels: Any,
    run: Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]],
) -> bool:
    """Return whether to shift labels: they repeat an integer input, and no score depends on a later token.

    Args:
        inputs: one batch by name.
        labels: its labels, or any other target.
        run: the model's outputs for a batch, the scores (B, T, V) first.
    """
    if isinstance(labels, torch.Tensor):
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
