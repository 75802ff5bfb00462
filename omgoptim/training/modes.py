"""Context managers for the mode and device of a trained module and its teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from omgoptim.training.evaluator import device_of, eval_mode


def placed(module: nn.Module, device: str) -> nn.Module:
    """Return a module on a device: itself if it is there, else a copy."""
    return module if device_of(module).type == device else copy.deepcopy(module).to(device)


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Put a module in train mode; afterwards move it to the CPU and restore every layer's mode.

    Batch normalization with frozen parameters keeps its mode: its statistics are frozen too.
    """
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        try:
            module.train()
        except NotImplementedError:  # a .pt2 has one mode only, that of its export
            for layer, _ in modes:
                layer.training = True
        for layer, mode in modes:
            own = list(layer.parameters(recurse=False))
            if isinstance(layer, _BatchNorm) and own and not any(parameter.requires_grad for parameter in own):
                layer.training = mode
        yield
    finally:
        module.to("cpu")
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def teaching(teacher: nn.Module | None, device: str) -> Iterator[None]:
    """Put a teacher in eval mode on the device; restore it afterwards."""
    with eval_mode(teacher, device) if teacher is not None else nullcontext():
        yield
