"""Geometry of convolutions: the options that build one, read from a convolution or from a block in its place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypedDict

import torch
from torch import nn

CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
"""Convolutions by the number of spatial dimensions."""
NORMS: dict[int, type[nn.BatchNorm1d] | type[nn.BatchNorm2d]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
"""Normalizations by the number of spatial dimensions."""

SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")

Numbers = int | Sequence[int]


class ConvOptions(TypedDict, total=False):
    """Options of a convolution beside channels and kernel, as torch.nn.Conv2d takes them."""

    stride: Numbers
    padding: Numbers | str
    dilation: Numbers
    groups: int
    bias: bool
    padding_mode: str
    device: torch.device | str | None
    dtype: torch.dtype | None


def refuse_others(options: ConvOptions, allowed: Collection[str]) -> None:
    """Raise a TypeError for an option that a block does not have, as a call with an unknown argument does."""
    unknown = sorted(set(options) - {*SIZES, "device", "dtype", *allowed})
    if unknown:
        raise TypeError(f"unexpected options: {', '.join(unknown)}")


def placement(options: ConvOptions) -> dict[str, Any]:
    """Return device and dtype of a block's layers."""
    return {"device": options.get("device"), "dtype": options.get("dtype")}


def sizes(value: Numbers, dims: int) -> tuple[int, ...]:
    """Return one size for each dimension.

    Raises:
        ValueError: there are more or fewer.
    """
    if isinstance(value, int):
        return (value,) * dims
    if len(value) != dims:
        raise ValueError(f"{dims} sizes are needed, not {list(value)}")
    return tuple(int(each) for each in value)


def check_dims(dims: int) -> int:
    """Return the number of spatial dimensions, if there is such a convolution here."""
    if dims not in CONVS:
        raise ValueError(f"dims must be 1 or 2, not {dims}")
    return dims


def geometry_config(block: Any, *further: str) -> dict[str, Any]:
    """Return the geometry of a block in place of a convolution, and further attributes of it, as JSON."""
    geometry = {name: getattr(block, name) for name in (*SIZES, *further)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in geometry.items()}


def geometry_of(conv: nn.Conv1d | nn.Conv2d, *further: str) -> dict[str, Any]:
    """Return the arguments that a convolution was built with, and further attributes of it; not its bias."""
    placed = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    return {name: getattr(conv, name) for name in (*SIZES, *further)} | placed
