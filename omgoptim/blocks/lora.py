"""Low-rank adapters (LoRA): a frozen layer plus a trainable product of two thin weights, merged afterwards.

LoRA saves memory while training (optimizer state and gradients of the thin weights only). Merged, the layer is the
plain one that it was before: nothing is saved, and nothing lost, at inference.

Source: Hu et al. 2021, arXiv:2106.09685: A Kaiming-uniform (a = sqrt 5), B zero, scaled by alpha / rank. Differences: a
mask that keeps zeros of the merged weight zero, and the rank is cut to what the weight can have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd


class LoRALinear(nn.Module):
    """A Linear whose weight is W + (alpha / rank) B A, W frozen.

    Shapes: input (*, in), output (*, out); `lora_a` (rank, in), `lora_b` (out, rank). With a mask (out, in) the product
    counts only where it is True. Starts out equal to `base`, because B is zero.

    Args:
        base: the layer, which is kept, and frozen.
        rank: cut to min(in, out).
        alpha: the product is scaled by alpha / rank, after the cut.
        mask: where the weight may change; None for everywhere.
        generator: that A is drawn from; None for torch's global one.

    Example:
        >>> import torch
        >>> from omgoptim.blocks import LoRALinear
        >>> layer = LoRALinear(torch.nn.Linear(64, 32), rank=4)
        >>> sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
        384
        >>> layer.merge()
        Linear(in_features=64, out_features=32, bias=True)

    Raises:
        ValueError: rank is below 1, or the mask is not of the weight's shape.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    mask: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base, self.alpha, self.merged = base, alpha, False
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank = _prepare(self, base, rank, mask, generator)

    @property
    def weight(self) -> Tensor:
        """Return W + (alpha / rank) B A, (out, in), for code that reads a Linear's weight; computed unless merged."""
        return self.base.weight if self.merged else self.base.weight + self.delta()

    @property
    def bias(self) -> Tensor | None:
        """The bias of `base`, (out,)."""
        return self.base.bias

    def delta(self) -> Tensor:
        """Return the weight update (alpha / rank) B A, masked, (out, in)."""
        return _delta(self)

    def forward(self, input: Tensor) -> Tensor:
        """Return (…, out) for (…, in)."""
        if self.merged:
            return F.linear(input, self.base.weight, self.base.bias)
        if self.mask is not None:
            return F.linear(input, self.weight, self.base.bias)
        added = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.base.weight, self.base.bias) + added * (self.alpha / self.rank)

    def merge(self) -> nn.Linear:
        """Add the product to the weight, in place; returns `base`, the plain layer. A second call changes nothing."""
        _merge(self)
        return self.base

    def unmerge(self) -> None:
        """Take the product out of the weight again, exact to float tolerance."""
        _unmerge(self)

    def config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as JSON."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.base.bias is not None,
            "rank": self.rank,
            "alpha": self.alpha,
            "masked": self.mask is not None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoRALinear:
        """Build a layer from its `config()`, to load a state into."""
        base = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
        mask = torch.ones_like(base.weight, dtype=torch.bool) if config["masked"] else None
        return cls(base, config["rank"], config["alpha"], mask)

    def extra_repr(self) -> str:
        """Return rank, alpha and state for the module's repr."""
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


class LoRAConv(nn.Module):
    """A convolution (1, 2 or 3 dimensions, any groups) whose weight is W + (alpha / rank) B A, W frozen.

    Shapes: W (out, in / groups, k, …) taken as the matrix (out, in / groups x k x …); `lora_a` (rank, columns),
    `lora_b` (out, rank). The product is added to the weight before the one convolution, which costs a copy of the
    weight and keeps padding modes, groups and zeros right. Arguments and Raises as in LoRALinear.

    Example:
        >>> import torch
        >>> from omgoptim.blocks import LoRAConv
        >>> layer = LoRAConv(torch.nn.Conv2d(8, 16, 3), rank=2)
        >>> tuple(layer.lora_a.shape), tuple(layer.lora_b.shape)
        ((2, 72), (16, 2))
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    mask: Tensor | None

    def __init__(
        self,
        base: _ConvNd,
        rank: int = 8,
        alpha: float = 16.0,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base, self.alpha, self.merged = base, alpha, False
        self.rank = _prepare(self, base, rank, mask, generator)

    @property
    def weight(self) -> Tensor:
        """Return W + (alpha / rank) B A, in the shape of W; computed unless merged."""
        return self.base.weight if self.merged else self.base.weight + self.delta()

    @property
    def bias(self) -> Tensor | None:
        """The bias of `base`, (out,)."""
        return self.base.bias

    def delta(self) -> Tensor:
        """Return the weight update in the shape of the weight."""
        return _delta(self)

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out, *space) for (N, in, *space)."""
        convolved: Tensor = self.base._conv_forward(input, self.weight, self.base.bias)
        return convolved

    def merge(self) -> _ConvNd:
        """Add the product to the weight, in place; returns `base`, the plain layer. A second call changes nothing."""
        _merge(self)
        return self.base

    def unmerge(self) -> None:
        """Take the product out of the weight again, exact to float tolerance."""
        _unmerge(self)

    def extra_repr(self) -> str:
        """Return rank, alpha and state for the module's repr."""
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


def _prepare(
    layer: nn.Module,
    base: nn.Linear | _ConvNd,
    rank: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> int:
    """Freeze the base and add A, B and the mask; return the rank, cut to what the weight can have."""
    weight: Tensor = base.weight
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"the mask is {tuple(mask.shape)}, and the weight {tuple(weight.shape)}")
    rows, columns = weight.shape[0], weight[0].numel()
    rank = min(rank, rows, columns)
    base.requires_grad_(False)
    bound = 1 / math.sqrt(columns)  # Kaiming-uniform with a = sqrt 5: sqrt(6 / (1 + 5) / columns)
    a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    layer.lora_a = nn.Parameter(a.to(weight.device, weight.dtype))
    layer.lora_b = nn.Parameter(torch.zeros(rows, rank, device=weight.device, dtype=weight.dtype))
    layer.register_buffer("mask", None if mask is None else mask.to(weight.device, torch.bool).clone())
    layer.train(base.training)
    return rank


def _delta(layer: LoRALinear | LoRAConv) -> Tensor:
    product = (layer.lora_b @ layer.lora_a).reshape(layer.base.weight.shape) * (layer.alpha / layer.rank)
    return product if layer.mask is None else product.masked_fill(~layer.mask, 0.0)


def _merge(layer: LoRALinear | LoRAConv) -> None:
    if not layer.merged:
        with torch.no_grad():
            layer.base.weight += _delta(layer)
        layer.merged = True


def _unmerge(layer: LoRALinear | LoRAConv) -> None:
    if layer.merged:
        with torch.no_grad():
            layer.base.weight -= _delta(layer)
        layer.merged = False
