"""The batch on which layers are fitted: as many of the run's samples as memory allows, as one."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from omgoptim.models.forward import NamedBatch
from omgoptim.models.samples import batch_length, forward_args
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.reconstruction.padding import to_one_length
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
