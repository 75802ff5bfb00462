"""Mode, device and random state of a training: set for its duration, restored afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def on_device(module: nn.Module, device: str) -> nn.Module:
    """Return a module on a device: itself if it is there, else a copy."""
    return module if device_of(module).type == device else copy.deepcopy(module).to(device)


@contextmanager
def train_mode(module: nn.Module) -> Iterator[None]:
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
            parameters = list(layer.parameters(recurse=False))
            if (
                isinstance(layer, _BatchNorm)
                and parameters
                and not any(parameter.requires_grad for parameter in parameters)
            ):
                layer.training = mode
        yield
    finally:
        module.to("cpu")
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def teacher_mode(teacher: nn.Module | None, device: str) -> Iterator[None]:
    """Put a teacher in eval mode on the device; restore it afterwards."""
    with eval_mode(teacher, device) if teacher is not None else nullcontext():
        yield


@contextmanager
def eval_mode(module: nn.Module, device: str | torch.device) -> Iterator[None]:
    """Put a module in eval mode on a device; restore every layer's mode and the device afterwards."""
    modes = [(layer, layer.training) for layer in module.modules()]
    home = device_of(module)
    try:
        for layer, _ in modes:
            layer.training = False  # all that eval() does, and what opens a .pt2 does not accept eval()
        module.to(device)
        yield
    finally:
        module.to(home)
        for layer, mode in modes:
            layer.training = mode


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first tensor; the CPU for a module without any."""
    first = next((tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors), None)
    return torch.device("cpu") if first is None else first.device


def seed_everything(*parts: int) -> None:
    """Seed torch, numpy and random from a few non-negative numbers: augmentation and dropout draw from all three."""
    words = np.random.SeedSequence(parts).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


@contextmanager
def own_randomness() -> Iterator[None]:
    """Restore the global random states at the end of the block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
