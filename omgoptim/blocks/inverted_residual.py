"""Inverted residual block of MobileNetV2.

Built from plain numbers, which `config` gives back, so that an artifact can rebuild it.
Source: MobileNetV2, arXiv:1801.04381.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from omgoptim.blocks.geometry import (
    CONVS,
    NORMS,
    ConvOptions,
    Numbers,
    check_dims,
    geometry_config,
    geometry_of,
    placement,
    refuse_others,
    sizes,
)

MIDDLE = 3.0
"""Midpoint of ReLU6's linear range 0..6."""


class InvertedResidual(nn.Module):
    """`expand` 1x1 to `hidden`, norm, ReLU6; `depthwise`, norm, ReLU6; `project` 1x1, norm; plus the input if it fits.

    hidden = round(expansion * in); with expansion 1 there is no `expand`, as in the paper. With `residual` the input is
    added where the block gives its shape: in = out, stride 1, and a padding that keeps the size. No part has a bias:
    each norm has. What followed a convolution that it replaces, its normalization and ReLU, stays behind it.

    Shapes: input (N, in, *), output (N, out, *) as of a convolution with that kernel, stride, padding and dilation.
    Parameters: hidden * (in + kernel + out) and 2 * (2 * hidden + out) of the norms: 3x3, 64 -> 128, expansion 2:
    25,728 + 768 instead of 73,728.

    Example:
        >>> import torch
        >>> from omgoptim.blocks import InvertedResidual
        >>> block = InvertedResidual(16, 16, expansion=2)
        >>> block.hidden, block.adds_input
        (32, True)
        >>> block(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: of `depthwise`.
        expansion: hidden channels over input channels.
        residual: whether the input is added where it fits.
        dims: 1 or 2.
        **options: stride, padding (1 by default), dilation, device and dtype, as of a convolution.

    Raises:
        ValueError: dims is neither 1 nor 2, a kernel, stride or dilation has another number of sizes, or expansion is
            below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers = 3,
        *,
        expansion: float = 6.0,
        residual: bool = True,
        dims: int = 2,
        **options: Unpack[ConvOptions],
    ) -> None:
        super().__init__()
        refuse_others(options, [])
        if not expansion >= 1:
            raise ValueError(f"expansion must be at least 1, not {expansion}")
        self.in_channels, self.out_channels, self.dims = in_channels, out_channels, check_dims(dims)
        stride, dilation, padding = options.get("stride", 1), options.get("dilation", 1), options.get("padding", 1)
        self.kernel_size, self.stride, self.dilation = (sizes(n, dims) for n in (kernel_size, stride, dilation))
        self.padding: tuple[int, ...] | str = padding if isinstance(padding, str) else sizes(padding, dims)
        self.expansion, self.hidden = float(expansion), round(expansion * in_channels)
        self.residual = residual
        placed = placement(options)
        conv, norm = CONVS[dims], NORMS[dims]
        self.expand = nn.Sequential()
        if self.hidden > in_channels:
            self.expand.append(conv(in_channels, self.hidden, 1, bias=False, **placed))
            self.expand.append(norm(self.hidden, **placed))
            self.expand.append(nn.ReLU6())
        self.depthwise = conv(
            self.hidden,
            self.hidden,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            groups=self.hidden,
            bias=False,
            **placed,
        )
        self.norm = norm(self.hidden, **placed)
        self.activation = nn.ReLU6()
        self.project = conv(self.hidden, out_channels, 1, bias=False, **placed)
        self.project_norm = norm(out_channels, **placed)

    @classmethod
    def like(cls, conv: nn.Conv1d | nn.Conv2d, expansion: float = 2.0, residual: bool = False) -> InvertedResidual:
        """Build a block of the same geometry as `conv`; weights are not copied."""
        block = cls(**geometry_of(conv), dims=len(conv.kernel_size), expansion=expansion, residual=residual).train(
            conv.training
        )
        return block.requires_grad_(conv.weight.requires_grad)

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d, expansion: float = 2.0) -> InvertedResidual:
        """Build a block that approximates `conv` on inputs that are not negative, as behind a ReLU.

        `expand` copies channels; the kernels of `depthwise` are, for each input channel i, the leading singular vectors
        of its matrix W[:, i] (out, kernel); `project` has the other singular vectors. The output of `depthwise` is
        shifted by `MIDDLE` into the range that ReLU6 leaves unchanged, and the last norm shifts it back. The input is
        not added, as by the convolution.

        Raises:
            ValueError: the convolution is grouped or does not pad with zeros.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(f"groups must be 1 and padding_mode zeros, not {conv.groups} and {conv.padding_mode}")
        block = cls.like(conv, expansion)
        w_IOK = conv.weight.detach().double().transpose(0, 1).flatten(2)
        inputs, outputs, _ = w_IOK.shape
        left, values, right = torch.linalg.svd(w_IOK, full_matrices=False)
        copies: Any = block.expand[0] if len(block.expand) else None
        with torch.no_grad():
            block.project.weight.zero_()  # units past the last singular vector have no say at first
            if copies is not None:
                copies.weight.zero_()
            for unit in range(block.hidden):
                channel, term = unit % inputs, unit // inputs
                if copies is not None:
                    copies.weight[unit, channel] = 1.0
                if term < values.shape[1]:
                    block.depthwise.weight[unit, 0] = right[channel, term].reshape(conv.kernel_size)
                    column = left[channel, :, term] * values[channel, term]
                    block.project.weight[:, unit] = column.reshape(outputs, *[1] * block.dims)
            block.norm.bias.fill_(MIDDLE)
            moved = -MIDDLE * block.project.weight.flatten(1).sum(1)
            block.project_norm.bias.copy_(moved if conv.bias is None else moved + conv.bias)
        return block

    @property
    def adds_input(self) -> bool:
        """Return whether the input is added to the block's output."""
        steps = self.dilation if isinstance(self.padding, str) else self.padding
        kept = {"same": True, "valid": all(size == 1 for size in self.kernel_size)}.get(
            str(self.padding),
            all(2 * p == d * (k - 1) for p, d, k in zip(steps, self.dilation, self.kernel_size, strict=True)),
        )
        fits = kept and self.in_channels == self.out_channels and all(step == 1 for step in self.stride)
        return self.residual and fits

    @property
    def weight(self) -> Tensor:
        """Return the weight of `depthwise`, (hidden, 1, *kernel), for code that reads a convolution's weight."""
        return self.depthwise.weight

    def config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as JSON."""
        own = {"expansion": self.expansion, "residual": self.residual, "dims": self.dims}
        return {**geometry_config(self), **own}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> InvertedResidual:
        """Build a block from its `config()`."""
        return cls(**config)

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out_channels, *space) for (N, in_channels, *space)."""
        filtered = self.activation(self.norm(self.depthwise(self.expand(input))))
        output: Tensor = self.project_norm(self.project(filtered))
        return input + output if self.adds_input else output

    def extra_repr(self) -> str:
        """Return channels, kernel size and expansion for the module's repr."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, expansion={self.expansion:g}"
