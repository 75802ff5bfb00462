"""Patches of a convolution's input: padded and unfolded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def padded(layer: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """Pad an input (N, C, *size) as the layer does, to (N, C, H, W); H is 1 for a Conv1d."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    found = functional.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    return found.unsqueeze(2) if isinstance(layer, nn.Conv1d) else found


def patches_of(layer: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """Return the patches of a `padded` input: (N, groups * F, positions), F in the order of one output's weight."""
    geometry: list[Any] = [
        (1, *value) if len(value) == 1 else value for value in (layer.kernel_size, layer.dilation, layer.stride)
    ]
    kernel, dilation, stride = geometry
    return functional.unfold(images, kernel, dilation, 0, stride)
