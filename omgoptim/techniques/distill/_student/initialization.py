"""Random reinitialization of a student's weights."""

from __future__ import annotations

import torch
from torch import nn


def reinitialize(module: nn.Module, seed: int) -> None:
    """Reinitialize every layer in place; the same ones for the same seed.

    A layer's own `reset_parameters` is called; where it has none, each of its tensors is drawn from a normal
    distribution of the mean and the deviation that it has. Buffers that no layer resets stay.
    """
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        torch.manual_seed(seed)
        for layer in module.modules():
            own = [tensor for tensor in layer._parameters.values() if tensor is not None]
            if not own:
                continue
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for tensor in own:
                if tensor.is_floating_point():
                    deviation = float(tensor.std()) if tensor.numel() > 1 else 0.0
                    tensor.normal_(float(tensor.mean()), deviation)
