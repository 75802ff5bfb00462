"""Re-estimation of batch-norm statistics after weights were removed.

Removing weights changes the outputs of layers, while the running mean and variance are still those of the outputs
before. Training inputs, without labels, are enough to estimate them again, and no weight changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import NamedBatch
from omgoptim.models.samples import Samples, batch_length, forward_args
from omgoptim.runtimes.signature import Signature

MIN_SAMPLES = 32
"""Minimum samples of a joined batch. Chosen: the batch variance of fewer is too noisy, and of one sample undefined."""


def reestimate(module: nn.Module, signature: Signature, batches: Samples) -> int:
    """Estimate the running statistics of every batch-norm layer on these inputs, in place.

    The mean and the (unbiased) variance become the average of the batches' own, each batch counting the same, so that
    their order hardly matters. Batches of fewer than 32 samples are joined where their shapes allow. Everything else is
    in eval mode meanwhile, so that dropout is off; modes and momentum are put back.

    Args:
        module: runs where it is; its inputs are brought there.
        signature: how the module is called.
        batches: of the train split; targets are not read.

    Returns:
        How many layers were estimated anew: those that the forward reaches. 0 leaves the module as it was.
    """
    layers = _norms(module)
    joined = [batch for batch in _joined(batches.batches) if batch_length(batch) > 1]
    if not layers or not joined:
        return 0
    device = next(module.parameters()).device
    before = [(layer, {name: value.clone() for name, value in layer.named_buffers()}) for layer in layers]
    with evaluation_mode(module), _estimating(layers):
        for batch in joined:
            args, kwargs = forward_args(signature, batch, device)
            module(*args, **kwargs)
    estimated = 0
    for layer, buffers in before:
        if layer.num_batches_tracked:
            estimated += 1
        else:
            for name, value in layer.named_buffers():
                value.copy_(buffers[name])
    return estimated


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.running_mean is not None
    ]


@contextmanager
def _estimating(layers: list[_BatchNorm]) -> Iterator[None]:
    """Let these layers, of a module in eval mode, take the cumulative average over the batches."""
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.training = True
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _joined(batches: list[NamedBatch]) -> Iterator[NamedBatch]:
    """Join neighbouring small batches of the same shapes into batches of `MIN_SAMPLES` samples or more."""
    waiting: list[NamedBatch] = []
    for batch in batches:
        if waiting and _shapes(batch) != _shapes(waiting[0]):
            yield _concatenated(waiting)
            waiting = []
        waiting.append(batch)
        if sum(map(batch_length, waiting)) >= MIN_SAMPLES:
            yield _concatenated(waiting)
            waiting = []
    if waiting:
        yield _concatenated(waiting)


def _shapes(batch: NamedBatch) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in batch.values()]


def _concatenated(batches: list[NamedBatch]) -> NamedBatch:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
