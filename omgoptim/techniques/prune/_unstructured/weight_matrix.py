"""A layer's weight as a matrix with one row per output: the meaning of "per row" and "along the inputs".

A row holds what one output (a unit, a channel, a gate of a recurrent unit) reads. Its columns run over the kernel's
positions, and at each over the input channels, so that neighbours in a row are neighbouring input channels at the same
position: the order in which n:m kernels want their groups (as NVIDIA's ASP permutes convolutions).

    Linear            (O, I)              ->  (O, I)
    Conv, g groups    (O, I/g, *k)        ->  (O, *k * I/g)
    ConvTranspose     (I, O/g, *k)        ->  (O, *k * I/g)
    Conv1D of GPT-2   (I, O)              ->  (O, I)
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def is_linear_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is Hugging Face's Conv1D: a Linear that stores its weight as (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def to_rows(tensor: Tensor, layer: nn.Module) -> Tensor:
    """Return a tensor of the weight's shape as (outputs, inputs that each reads)."""
    if is_linear_transposed(layer):
        return tensor.T
    if isinstance(layer, _ConvTransposeNd):
        inputs, outputs = tensor.shape[0] // layer.groups, tensor.shape[1]
        grouped = tensor.reshape(layer.groups, inputs, outputs, -1)  # (g, I/g, O/g, K)
        return grouped.permute(0, 2, 3, 1).reshape(layer.groups * outputs, -1)
    if isinstance(layer, _ConvNd):
        return tensor.flatten(2).transpose(1, 2).reshape(tensor.shape[0], -1)
    return tensor


def from_rows(rows: Tensor, layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return (outputs, inputs) in the shape of the layer's weight: the inverse of `to_rows`."""
    if is_linear_transposed(layer):
        return rows.T
    if isinstance(layer, _ConvTransposeNd):
        inputs, outputs, kernel = shape[0] // layer.groups, shape[1], math.prod(shape[2:])
        grouped = rows.reshape(layer.groups, outputs, kernel, inputs)
        return grouped.permute(0, 3, 1, 2).reshape(shape)
    if isinstance(layer, _ConvNd):
        return rows.reshape(shape[0], math.prod(shape[2:]), shape[1]).transpose(1, 2).reshape(shape)
    return rows


def channels_in(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the input channels that one output reads: the length of the runs in a row that n:m groups lie in."""
    if isinstance(layer, _ConvTransposeNd):
        return shape[0] // layer.groups
    return shape[0] if is_linear_transposed(layer) else shape[1]
