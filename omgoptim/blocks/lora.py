"""Low-rank adapters (LoRA): a frozen layer plus a trainable low-rank product, merged afterwards.

LoRA saves memory while training (optimizer state and gradients of the thin weights only). Merged, the layer is the
plain one that it was before: nothing is saved, and nothing lost, at inference.

Source: Hu et al. 2021, arXiv:2106.09685: A Kaiming-uniform (a = sqrt 5), B zero, scaled by alpha / rank. Differences: a
mask that keeps zeros of the merged weight zero, and the rank is cut to what the weight can have.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd


class _LoRA(nn.Module):
    """Base of the adapters: a frozen layer with W, and the factors A and B of its update."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    mask: Tensor | None

    def __init__(
        self, base: Any, rank: int, alpha: float, mask: Tensor | None, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        weight: Tensor = base.weight
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        rows, columns = weight.shape[0], weight[0].numel()
        self.base, self.alpha, self.merged = base.requires_grad_(False), alpha, False
        self.rank = min(rank, rows, columns)
        bound = 1 / math.sqrt(columns)  # Kaiming-uniform with a = sqrt 5: sqrt(6 / (1 + 5) / columns)
        a = torch.empty(self.rank, columns).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(weight.device, weight.dtype))
        self.lora_b = nn.Parameter(torch.zeros(rows, self.rank, device=weight.device, dtype=weight.dtype))
        self.register_buffer("mask", None if mask is None else mask.to(weight.device, torch.bool).clone())
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """Return W + (alpha / rank) B A, for code that reads a layer's weight; computed unless merged."""
        weight: Tensor = self.base.weight
        return weight if self.merged else weight + self.delta()

    @property
    def bias(self) -> Tensor | None:
        """The bias of `base`, (out,)."""
        bias: Tensor | None = self.base.bias
        return bias

    def delta(self) -> Tensor:
        """Return the weight update (alpha / rank) B A, masked, in the shape of W."""
        product = (self.lora_b @ self.lora_a).reshape(self.base.weight.shape) * (self.alpha / self.rank)
        return product if self.mask is None else product.masked_fill(~self.mask, 0.0)

    def merge(self) -> Any:
        """Add the update to the weight, in place; return `base`, the plain layer. A second call changes nothing."""
        if not self.merged:
            with torch.no_grad():
                self.base.weight += self.delta()
            self.merged = True
        return self.base

    def extra_repr(self) -> str:
        """Return rank, alpha and state for the module's repr."""
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


class LoRALinear(_LoRA):
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

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, alpha, mask, generator)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Return (…, out) for (…, in)."""
        if self.merged or self.mask is not None:
            return F.linear(input, self.weight, self.bias)
        added = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.base.weight, self.bias) + added * (self.alpha / self.rank)


class LoRAConv(_LoRA):
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

    def __init__(
        self,
        base: _ConvNd,
        rank: int = 8,
        alpha: float = 16.0,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, alpha, mask, generator)

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out, *space) for (N, in, *space)."""
        convolved: Tensor = self.base._conv_forward(input, self.weight, self.bias)
        return convolved
