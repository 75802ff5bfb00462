"""Data-parallel training: each process has its share of every batch, and gradients are summed before each step.

The steps are those of one process, with the same batches, learning rates and epochs, except that batch normalization
sees a share at a time. Processes are those that Accelerate finds in the environment (RANK, WORLD_SIZE).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.training.batches import Batch


def share_of(batch: Batch, rank: int, ranks: int) -> Batch | None:
    """Return the samples of a batch that a process computes; None where it has none.

    A batch of fewer than two samples for each process stays whole, and is the first process's.

    Raises:
        TechniqueError: the target cannot be divided by samples.
    """
    if batch.size < 2 * ranks:
        return batch if rank == 0 else None
    start, end = (batch.size * place // ranks for place in (rank, rank + 1))
    target = batch.target
    if isinstance(target, (Tensor, list, tuple)) and len(target) == batch.size:
        target = target[start:end]
    elif target is not None:
        raise TechniqueError(
            "the training data cannot be divided among workers",
            f"the target of a batch is a {type(target).__name__}, not one value for each sample",
            "train with one worker, or give targets as tensors",
        )
    return Batch({name: tensor[start:end] for name, tensor in batch.inputs.items()}, target)


def sum_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the processes; a parameter without one in any process keeps none."""
    parameters = list(parameters)
    present = torch.tensor([float(each.grad is not None) for each in parameters], device=accelerator.device)
    flat = torch.cat(
        [(each.grad if each.grad is not None else torch.zeros_like(each)).reshape(-1) for each in parameters]
    )
    present, flat = accelerator.reduce(present, "sum"), accelerator.reduce(flat, "sum")
    sizes = [each.numel() for each in parameters]
    for each, some, summed in zip(parameters, present.tolist(), flat.split(sizes), strict=True):
        each.grad = summed.view_as(each).to(each.dtype).clone() if some else None


def average_buffers(accelerator: Any, module: nn.Module) -> None:
    """Give every process the mean of the floating-point buffers, such as the statistics of batch normalization."""
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))


def from_first(value: Any, ranks: int) -> Any:
    """Return what the first process has."""
    if ranks == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
