"""Depthwise-separable convolution.

Built from plain numbers, which `config` gives back, so that an artifact can rebuild it.
Source: MobileNets, arXiv:1704.04861; Xception, arXiv:1610.02357.
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


class DepthSeparableConv(nn.Module):
    """Depthwise-separable Conv1d or Conv2d: `depthwise`, one kernel per channel, then `pointwise`, 1x1 with the bias.

    It takes the convolution's place and no more: what follows a teacher's convolution, its own batch normalization and
    ReLU, stays behind it. Between the two parts there is nothing by default: so it can begin as the nearest to the
    weights of a convolution (`from_conv`), and without an activation there it trains better too, as Xception found.
    `norm` and `activation` put these in between, as MobileNet has it.

    Shapes: input (N, in, *), output (N, out, *) as of the convolution; `depthwise.weight` (in, 1, *kernel),
    `pointwise.weight` (out, in, *1). Parameters without bias and norm: in * (kernel + out) instead of
    in * out * kernel: 3x3, 64 -> 128: 8,768 instead of 73,728. Multiply-accumulates likewise, at every position of
    the output.

    Example:
        >>> import torch
        >>> from omgoptim.blocks import DepthSeparableConv
        >>> block = DepthSeparableConv.from_conv(torch.nn.Conv2d(64, 128, 3, padding=1))
        >>> sum(parameter.numel() for parameter in block.parameters())
        8896
        >>> block(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 128, 8, 8])

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: of `depthwise`.
        norm: batch normalization between the two.
        activation: ReLU between the two.
        dims: 1 or 2.
        **options: stride, padding, dilation, bias, device and dtype, as of a convolution.

    Raises:
        ValueError: dims is neither 1 nor 2, or a kernel, stride or dilation has another number of sizes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        *,
        norm: bool = False,
        activation: bool = False,
        dims: int = 2,
        **options: Unpack[ConvOptions],
    ) -> None:
        super().__init__()
        refuse_others(options, ["bias"])
        self.in_channels, self.out_channels, self.dims = in_channels, out_channels, check_dims(dims)
        stride, dilation, padding = options.get("stride", 1), options.get("dilation", 1), options.get("padding", 0)
        self.kernel_size, self.stride, self.dilation = (sizes(n, dims) for n in (kernel_size, stride, dilation))
        self.padding: tuple[int, ...] | str = padding if isinstance(padding, str) else sizes(padding, dims)
        self.has_norm, self.has_activation = norm, activation
        placed = placement(options)
        conv = CONVS[dims]
        self.depthwise = conv(
            in_channels,
            in_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            groups=in_channels,
            bias=False,
            **placed,
        )
        self.norm = NORMS[dims](in_channels, **placed) if norm else nn.Identity()
        self.activation = nn.ReLU() if activation else nn.Identity()
        self.pointwise = conv(in_channels, out_channels, 1, bias=options.get("bias", True), **placed)

    @classmethod
    def like(cls, conv: nn.Conv1d | nn.Conv2d, norm: bool = False, activation: bool = False) -> DepthSeparableConv:
        """Build a block of the same geometry as `conv`; weights are not copied."""
        own: dict[str, Any] = {"bias": conv.bias is not None, "norm": norm, "activation": activation}
        return cls(**geometry_of(conv), **own, dims=len(conv.kernel_size)).train(conv.training)

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d, norm: bool = False, activation: bool = False) -> DepthSeparableConv:
        """Build a block with the weights nearest to those of `conv`; outputs are near without norm and activation.

        The weights that read input channel i are a matrix W[:, i] (out, kernel); its first singular pair gives the
        kernel of i and its column of the 1x1 mix. Channels are independent in W, so this is the least squared error.

        Raises:
            ValueError: the convolution is grouped or does not pad with zeros.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(f"groups must be 1 and padding_mode zeros, not {conv.groups} and {conv.padding_mode}")
        block = cls.like(conv, norm, activation)
        w_IOK = conv.weight.detach().double().transpose(0, 1).flatten(2)
        left, values, right = torch.linalg.svd(w_IOK, full_matrices=False)
        root = values[:, 0].sqrt()
        kernels, mix = right[:, 0] * root[:, None], (left[:, :, 0] * root[:, None]).T
        with torch.no_grad():
            block.depthwise.weight.copy_(kernels.reshape(block.depthwise.weight.shape))
            block.pointwise.weight.copy_(mix.reshape(block.pointwise.weight.shape))
            if block.pointwise.bias is not None and conv.bias is not None:
                block.pointwise.bias.copy_(conv.bias)
        return block.requires_grad_(conv.weight.requires_grad)

    def dense_weight(self) -> Tensor:
        """Return the weight (out, in, *kernel) that the two represent, where nothing is in between."""
        return self.pointwise.weight * self.depthwise.weight.transpose(0, 1)

    @property
    def weight(self) -> Tensor:
        """Return `dense_weight`, for code that reads a convolution's weight (its dtype, say); computed in each call."""
        return self.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of `pointwise`, (out,)."""
        return self.pointwise.bias

    def config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as JSON."""
        own = {"norm": self.has_norm, "activation": self.has_activation, "dims": self.dims}
        return {**geometry_config(self), "bias": self.pointwise.bias is not None, **own}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DepthSeparableConv:
        """Build a layer from its `config()`."""
        return cls(**config)

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out_channels, *space) for (N, in_channels, *space)."""
        output: Tensor = self.pointwise(self.activation(self.norm(self.depthwise(input))))
        return output

    def extra_repr(self) -> str:
        """Return channels, kernel size and stride for the module's repr."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
