"""Metrics of language models: log-likelihood per token, which gives perplexity, and KL divergence from the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError
from omgoptim.measure.intervals import Arrays
from omgoptim.models.labels import IGNORED


def token_log_likelihoods(
    outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays], index: int = 0
) -> NDArray[np.float64]:
    """Return per sample the summed log-probability of its targets over the mean number of targets, in nats.

    The mean over samples is the mean over all targets; the perplexity is exp of minus it. Scores are (N, ..., C),
    targets (N, ...) of integers, -100 left out.

    Args:
        outputs: per batch the flat list of outputs.
        targets: token ids of the same batches.
        original: outputs of the original, per batch.
        index: of the output that holds the scores.

    Raises:
        DataError: the targets do not fit the scores.
    """
    del original
    sums, counts = [], []
    for batch, raw in zip(outputs, targets, strict=True):
        scores, target = batch[index], np.asarray(raw)
        if scores.shape[:-1] != target.shape or not np.issubdtype(target.dtype, np.integer):
            raise DataError(
                "metric perplexity does not fit the outputs",
                f"outputs are {scores.shape}, targets {target.shape} of {target.dtype}",
                "it needs integer targets, one for each row of class scores",
            )
        counted = target != IGNORED
        picked = np.take_along_axis(_log_probabilities(scores), np.where(counted, target, 0)[..., None], -1)[..., 0]
        sums.append(np.where(counted, picked, 0.0).reshape(len(target), -1).sum(1))
        counts.append(counted.reshape(len(target), -1).sum(1))
    total = np.concatenate(counts)
    used = total > 0
    return np.concatenate(sums)[used] / total[used].mean() if used.any() else np.zeros(0)


def negative_kl(
    outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays], index: int = 0
) -> NDArray[np.float64]:
    """Return per sample minus the mean KL divergence of its rows of class scores from the original's, in nats.

    0 is the original itself. Positions whose target is -100 are left out where the targets are one for each row.
    """
    divergences = []
    for batch, raw, reference in zip(outputs, targets, original, strict=True):
        ours, theirs = _log_probabilities(batch[index]), _log_probabilities(reference[index])
        rows = (np.exp(theirs) * (theirs - ours)).sum(-1)
        target = np.asarray(raw) if raw is not None else None
        fits = target is not None and target.shape == rows.shape and np.issubdtype(target.dtype, np.integer)
        counted = (target != IGNORED) if fits else np.ones(rows.shape, bool)
        flat, used = rows.reshape(len(rows), -1), np.asarray(counted).reshape(len(rows), -1)
        number = used.sum(1)
        divergences.append(((flat * used).sum(1) / np.maximum(number, 1))[number > 0])
    return np.asarray(-np.maximum(np.concatenate(divergences), 0.0), np.float64)


def _log_probabilities(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Convert logits, or probabilities if every row is one, to log-probabilities over the last axis."""
    if scores.ndim < 2 or scores.shape[-1] < 2:
        raise DataError("metric needs class scores", f"the output is {scores.shape}", "use metric auto or cosine")
    rows = scores.astype(np.float64)
    if (rows >= 0).all() and np.allclose(rows.sum(-1), 1.0, atol=1e-3):
        return np.asarray(np.log(np.maximum(rows, 1e-12)))
    rows = rows - rows.max(-1, keepdims=True)
    return np.asarray(rows - np.log(np.exp(rows).sum(-1, keepdims=True)))
