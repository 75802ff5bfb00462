"""Width of one side of a layer: reading it, reducing it, and masking its inputs.

A side is "out", the channels that a layer writes, or "in", those that it reads. A layer that treats every channel by
itself (a normalization, a depthwise convolution, PReLU) has one side, "out". Positions count channels of a side from 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

Side = Literal["out", "in"]


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a depthwise convolution."""
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def width_of(layer: nn.Module, side: Side) -> int | None:
    """Return the channels on one side of a layer; None where it cannot be cut."""
    if isinstance(layer, _ConvNd):
        return layer.out_channels if side == "out" else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "out" else layer.in_features
    if isinstance(layer, (_BatchNorm, _InstanceNorm)):  # the latter of which a BatchNorm is by inheritance
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    return None


def channel_groups(layer: nn.Module) -> int:
    """Return the number of groups into which a layer divides both its sides."""
    if isinstance(layer, _ConvNd) and not is_depthwise(layer):
        return layer.groups
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else 1


def cut(layer: nn.Module, side: Side, keep: Tensor, norm_groups: int | None = None) -> None:
    """Keep only some channels of one side.

    Args:
        layer: any that `width_of` knows; its tensors are replaced by new ones.
        side: `in` or `out`.
        keep: positions (k,) that stay, ascending.
        norm_groups: into how many groups a GroupNorm divides what stays; by default as many as before.

    Raises:
        ValueError: a grouped convolution would keep other positions in one of its groups than in another.
    """
    count = len(keep)
    if isinstance(layer, _ConvNd):
        _cut_conv(layer, side, keep)
    elif isinstance(layer, nn.Linear):
        if side == "out":
            _take(layer, keep, weight=0, bias=0)
            layer.out_features = count
        else:
            _take(layer, keep, weight=1)
            layer.in_features = count
    elif isinstance(layer, (_BatchNorm, _InstanceNorm)):
        _take(layer, keep, weight=0, bias=0, running_mean=0, running_var=0)
        layer.num_features = count
    elif isinstance(layer, nn.GroupNorm):
        _take(layer, keep, weight=0, bias=0)
        layer.num_channels = count
        layer.num_groups = norm_groups or layer.num_groups
    elif isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        _take(layer, keep, weight=0)
        layer.num_parameters = count
    elif isinstance(layer, nn.Embedding):
        _take(layer, keep, weight=1)
        layer.embedding_dim = count


def _cut_conv(layer: _ConvNd, side: Side, keep: Tensor) -> None:
    groups, count = layer.groups, len(keep)
    rows, columns = (1, 0) if layer.transposed else (0, 1)  # the axis of the outputs, and that of the inputs
    if is_depthwise(layer):
        _take(layer, keep, weight=0, bias=0)
        layer.in_channels = layer.out_channels = layer.groups = count
        return
    shared_axis = 1  # of a grouped convolution's weight: the same positions in every group
    axis = rows if side == "out" else columns
    total = layer.out_channels if side == "out" else layer.in_channels
    within = _within_group(keep, total, groups) if groups > 1 and axis == shared_axis else keep
    _take(layer, within, weight=axis)
    if side == "out":
        _take(layer, keep, bias=0)
        layer.out_channels = count
    else:
        layer.in_channels = count
    if groups > 1 and axis != shared_axis:
        _within_group(keep, total, groups)


def _within_group(keep: Tensor, total: int, groups: int) -> Tensor:
    """Return the positions that stay within one group, which must be the same in each."""
    size = total // groups
    if len(keep) % groups == 0:
        within = (keep % size).view(groups, -1)
        blocks = torch.arange(groups, device=keep.device).unsqueeze(1)
        if bool((within == within[0]).all()) and bool((keep.view(groups, -1) // size == blocks).all()):
            return within[0]
    raise ValueError(f"a convolution in {groups} groups can only lose the same channels from each")


def _take(layer: nn.Module, keep: Tensor, **axes: int) -> None:
    """Replace the layer's named tensors, where present, by the kept part along an axis."""
    for name, axis in axes.items():
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            setattr(layer, name, narrowed(tensor, axis, keep))


def narrowed(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    """Return the kept part of a tensor along an axis, a parameter if it was one."""
    left = tensor.detach().index_select(axis, keep.to(tensor.device)).clone()
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def silenced(layer: nn.Module, positions: Tensor) -> Tensor:
    """Return the weight of a Linear or a convolution with zeros where it reads the channels at `positions`."""
    weight: Tensor = layer.weight.detach().clone()  # type: ignore[operator]
    axis = 0 if getattr(layer, "transposed", False) else 1
    if axis == 1:
        positions = positions % weight.shape[1]  # of a grouped convolution: the same in each group
    weight.index_fill_(axis, positions.to(weight.device), 0.0)
    return weight


def as_rows(layer: nn.Module, side: Side, values: Tensor) -> Tensor:
    """Return values of the weight's shape, such as its gradient, as one row per channel of a side: (width, *).

    A grouped convolution reads channel c with the c-th column of its own group only.
    """
    groups: int = getattr(layer, "groups", 1)
    transposed: bool = getattr(layer, "transposed", False)
    if is_depthwise(layer):
        return values.flatten(1)
    if groups == 1:
        axis = int((side == "in") != transposed)
        return values.movedim(axis, 0).flatten(1)
    if (side == "out") != transposed:
        return values.flatten(1)
    grouped = values.view(groups, -1, *values.shape[1:])  # (groups, own side, other side, *kernel)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)
