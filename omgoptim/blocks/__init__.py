"""Compact layers that replace larger ones; artifacts of changed shape are rebuilt from them.

The names below are imported on first use, so that the room costs nothing where no layer is built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omgoptim.blocks.depth_separable import DepthSeparableConv
    from omgoptim.blocks.inverted_residual import InvertedResidual
    from omgoptim.blocks.lora import LoRAConv, LoRALinear
    from omgoptim.blocks.low_rank import LowRankLinear, SpatialConv2d, Tucker2Conv2d
    from omgoptim.blocks.registry import BLOCKS
    from omgoptim.blocks.resized import ResizedConv2d

_HOMES = {
    "BLOCKS": "registry",
    "DepthSeparableConv": "depth_separable",
    "InvertedResidual": "inverted_residual",
    "LoRAConv": "lora",
    "LoRALinear": "lora",
    "LowRankLinear": "low_rank",
    "ResizedConv2d": "resized",
    "SpatialConv2d": "low_rank",
    "Tucker2Conv2d": "low_rank",
}

__all__ = [
    "BLOCKS",
    "DepthSeparableConv",
    "InvertedResidual",
    "LoRAConv",
    "LoRALinear",
    "LowRankLinear",
    "ResizedConv2d",
    "SpatialConv2d",
    "Tucker2Conv2d",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
