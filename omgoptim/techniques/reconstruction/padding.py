"""Padded sequences brought to one length, so that their batches can be joined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from omgoptim.models.forward import NamedBatch
from omgoptim.techniques.reconstruction.rows import MASKS


def to_one_length(batches: list[NamedBatch], samples_at: Callable[[int], int]) -> list[NamedBatch]:
    """Pad shorter sequences with masked zeros, and cut longer ones.

    The length is the one that leaves most real positions: the longest, unless few samples are so long that all others
    would be mostly padding.

    Args:
        batches: with a mask (B, T) of 0 and 1 under a name in `MASKS`; T differs between batches.
        samples_at: how many samples fit into memory at a length.

    Returns:
        The batches as they are where there is no such mask, the lengths do not differ, or another input has a length
        that is not on its second axis.
    """
    name = next((name for name in MASKS if name in batches[0]), None)
    if name is None or not all(_is_mask(batch[name]) for batch in batches):
        return batches
    lengths = sorted({batch[name].shape[1] for batch in batches})
    if len(lengths) == 1:
        return batches
    real = np.concatenate([_fitted(batch[name], lengths[-1]) for batch in batches]) != 0
    counts = real.cumsum(1).cumsum(0)  # of the first n samples up to position t

    def real_positions(length: int) -> int:
        return int(counts[min(len(real), samples_at(length)) - 1, length - 1])

    best = max(reversed(lengths), key=real_positions)
    fitted = [_of_length(batch, batch[name].shape[1], best) for batch in batches]
    shapes = [{key: array.shape[1:] for key, array in batch.items()} for batch in fitted]
    return fitted if all(shape == shapes[0] for shape in shapes) else batches


def _is_mask(array: np.ndarray) -> bool:
    return array.ndim == 2 and bool(((array == 0) | (array == 1)).all())


def _of_length(batch: NamedBatch, length: int, new: int) -> NamedBatch:
    return {
        name: _fitted(array, new) if array.ndim > 1 and array.shape[1] == length else array
        for name, array in batch.items()
    }


def _fitted(array: np.ndarray, length: int) -> np.ndarray:
    """Return an array (B, T, ...) with its second axis cut, or filled up with zeros, to a length."""
    missing = max(0, length - array.shape[1])
    return np.pad(array[:, :length], [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
