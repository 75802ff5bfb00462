"""The batch on which layers are fitted: as many of the run's samples as memory allows, as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from omgoptim.models.forward import NamedBatch
from omgoptim.models.samples import batch_length, forward_args
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.reconstruction.rows import MASKS
from omgoptim.techniques.registry import ModuleRun

MOST_SAMPLES, MOST_ACTIVATIONS = 1024, 2**27
"""Maximum samples of the batch, and maximum values of its largest activation (512 MiB in float32)."""


def one_batch(module: nn.Module, run: ModuleRun) -> Probe:
    """Return the call of `module` on that batch; sequences padded to several lengths are brought to one."""
    largest = 1

    def look(_layer: nn.Module, _args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor) and output.ndim:
            largest = max(largest, output[0].numel())

    hooks = [layer.register_forward_hook(look) for layer in module.modules()]
    try:
        Probe.of(run).outputs(module)
    finally:
        for hook in hooks:
            hook.remove()
    probed = _length(run.statistics.batches[0])

    def samples_at(length: int) -> int:
        return max(2, min(MOST_SAMPLES, MOST_ACTIVATIONS * probed // (largest * length)))

    batches = to_one_length(run.statistics.batches, samples_at)
    samples = samples_at(probed if batches is run.statistics.batches else _length(batches[0]))
    return Probe(*forward_args(run.signature, joined(batches, samples), run.device))


def _length(batch: NamedBatch) -> int:
    """Return the length of padded sequences; 1 for a batch without a mask."""
    return next((batch[name].shape[-1] for name in MASKS if name in batch and batch[name].ndim), 1)


def joined(batches: list[NamedBatch], samples: int) -> NamedBatch:
    """Join the first `samples` of some batches into one batch.

    Batches of other sizes (texts of other lengths) are cut to those of the median batch; smaller ones are left out.
    """
    by_size = sorted(batches, key=lambda batch: sum(array[0].size for array in batch.values()))
    sizes = {name: array.shape[1:] for name, array in by_size[len(by_size) // 2].items()}
    taken: list[NamedBatch] = []
    count = 0
    for batch in batches:
        fits = all(
            all(own >= size for own, size in zip(array.shape[1:], sizes[name], strict=True))
            for name, array in batch.items()
        )
        if fits and count < samples:
            first = slice(0, samples - count)
            cut = {name: array[first][tuple(map(slice, (None, *sizes[name])))] for name, array in batch.items()}
            taken.append(cut)
            count += batch_length(cut)
    return {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]}


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
