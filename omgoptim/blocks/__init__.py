"""Compact layers that replace larger ones; artifacts of changed shape are rebuilt from them."""

from __future__ import annotations

from torch import nn

from omgoptim.blocks.depth_separable import DepthSeparableConv
from omgoptim.blocks.inverted_residual import InvertedResidual
from omgoptim.blocks.lora import LoRAConv, LoRALinear
from omgoptim.blocks.low_rank import LowRankLinear, SpatialConv2d, Tucker2Conv2d
from omgoptim.blocks.resized import ResizedConv2d

BLOCKS: dict[str, type[nn.Module]] = {
    block.__name__: block
    for block in (LowRankLinear, SpatialConv2d, Tucker2Conv2d, DepthSeparableConv, InvertedResidual, ResizedConv2d)
}
"""Blocks in artifacts, by class name: modules with `config()`, plain JSON, and a classmethod `from_config` that builds
the same shape from it. A LoRALinear is merged before a module is saved, so it is not among them.
"""

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
