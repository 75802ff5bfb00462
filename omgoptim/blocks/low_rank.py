"""Low-rank layers: a Linear as two factors, a Conv2d as two or three.

Each is built empty (torch's own initialization) from plain numbers, which `config` gives back, so that an artifact can
rebuild it; `dense_weight` is the one weight that it stands for. Parameters are counted here without the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from omgoptim.blocks.geometry import ConvOptions, Numbers, geometry_config, geometry_of, placement, refuse_others, sizes

Pair = tuple[int, int]


class LowRankLinear(nn.Module):
    """A Linear (in -> out) as two: `a` (in -> rank, without bias) and `b` (rank -> out, with it).

    Shapes: input (*, in), output (*, out); `a.weight` (rank, in), `b.weight` (out, rank); W = B A (out, in).
    Parameters and multiply-accumulates per row: rank * (in + out) instead of in * out, so fewer below a rank of
    in * out / (in + out).

    Example:
        >>> import torch
        >>> from omgoptim.blocks import LowRankLinear
        >>> layer = LowRankLinear(256, 128, rank=16)
        >>> sum(parameter.numel() for parameter in layer.parameters()), layer.dense_weight().numel()
        (6272, 32768)

    Raises:
        ValueError: rank is not in 1..min(in, out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_rank("rank", rank, min(in_features, out_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.a = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.b = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Linear, rank: int) -> LowRankLinear:
        """Build a layer of the same geometry as `layer`; weights are not copied."""
        weight = layer.weight
        return cls(
            layer.in_features, layer.out_features, rank, layer.bias is not None, weight.device, weight.dtype
        ).train(layer.training)

    @property
    def weight(self) -> Tensor:
        """Return `dense_weight`, for code that reads a Linear's weight (its dtype, say); computed in each call."""
        return self.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias of `b`, (out,)."""
        return self.b.bias

    def dense_weight(self) -> Tensor:
        """Return the weight (out, in) that the two represent."""
        return self.b.weight @ self.a.weight

    def config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as JSON."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.b.bias is not None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowRankLinear:
        """Build a layer from its `config()`."""
        return cls(**config)

    def forward(self, input: Tensor) -> Tensor:
        """Return (…, out_features) for (…, in_features)."""
        output: Tensor = self.b(self.a(input))
        return output

    def extra_repr(self) -> str:
        """Return sizes and rank for the module's repr."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class _LowRankConv2d(nn.Module):
    """Base of the low-rank forms of a Conv2d: its geometry, as plain numbers.

    Raises:
        ValueError: a geometry that no product of convolutions equals (another padding mode than zeros, a depthwise
            convolution), or channels that do not divide by groups.
    """

    b: nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Numbers, options: ConvOptions) -> None:
        super().__init__()
        refuse_others(options, ["bias", "groups", "padding_mode"])
        groups, padding_mode, padding = (
            options.get("groups", 1),
            options.get("padding_mode", "zeros"),
            options.get("padding", 0),
        )
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode '{padding_mode}' cannot be factorized exactly: only zeros can")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels are not divisible by {groups} groups")
        if groups > 1 and in_channels == groups:
            raise ValueError(f"a depthwise convolution (groups {groups} = in_channels) cannot be factorized")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        stride, dilation = options.get("stride", 1), options.get("dilation", 1)
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding: Pair | str = padding if isinstance(padding, str) else _pair(padding)
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise ValueError(f"padding must be integers, 'same' or 'valid', not '{padding}'")
            if self.padding == "same" and self.stride != (1, 1):
                raise ValueError("padding 'same' needs stride 1")

    @property
    def group_shape(self) -> tuple[int, int, int, int]:
        """Return the shape (out / groups, in / groups, kernel height, kernel width) of one group's weight."""
        return (self.out_channels // self.groups, self.in_channels // self.groups, *self.kernel_size)

    def dense_weight(self) -> Tensor:
        """Return the weight (out, in / groups, kernel height, kernel width) that the convolutions represent."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Return `dense_weight`, for code that reads a convolution's weight (its dtype, say); computed in each call."""
        return self.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias of `b`, (out,)."""
        return self.b.bias

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a layer from its `config()`."""
        return cls(**config)

    def _geometry(self) -> dict[str, Any]:
        return geometry_config(self, "groups") | {"bias": self.b.bias is not None}

    def extra_repr(self) -> str:
        """Return sizes and rank for the module's repr."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}"


class SpatialConv2d(_LowRankConv2d):
    """A Conv2d as two: `a`, kernel height x 1 to rank channels without bias; `b`, 1 x kernel width, with it.

    A 1x1 convolution becomes two 1x1 convolutions. A grouped one is factorized in each group, with `rank` channels
    in between for each. Stride, padding and dilation of the height go to `a`, those of the width to `b`: exact.

    Shapes, g = groups: `a.weight` (g rank, in/g, kh, 1), `b.weight` (out, rank, 1, kw);
    W[o, i, y, x] = sum over r of b[o, r, 0, x] a[r, i, y, 0] within the group of o.
    Parameters: rank * (in * kh + out * kw) instead of out * in/g * kh * kw. Multiply-accumulates: those of `a` at
    (H_out, W_in) positions, those of `b` at (H_out, W_out).

    Example:
        >>> import torch
        >>> from omgoptim.blocks import SpatialConv2d
        >>> layer = SpatialConv2d(32, 64, 3, rank=8, padding=1)
        >>> tuple(layer.a.weight.shape), tuple(layer.b.weight.shape)
        ((8, 32, 3, 1), (64, 8, 1, 3))
        >>> layer(torch.randn(2, 32, 8, 8)).shape
        torch.Size([2, 64, 8, 8])

    Raises:
        ValueError: rank is not in 1..min(in/g * kh, out/g * kw), or a geometry that it has no exact form for.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Numbers, rank: int, **options: Unpack[ConvOptions]
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, options)
        o, i, kh, kw = self.group_shape
        _check_rank("rank", rank, min(i * kh, o * kw))
        self.rank = rank
        (sh, sw), (dh, dw), padded = self.stride, self.dilation, self.padding
        pads = (padded, padded) if isinstance(padded, str) else ((padded[0], 0), (0, padded[1]))
        between, of = rank * self.groups, {"groups": self.groups, **placement(options)}
        bias = options.get("bias", True)
        self.a = nn.Conv2d(in_channels, between, (kh, 1), (sh, 1), pads[0], (dh, 1), bias=False, **of)
        self.b = nn.Conv2d(between, out_channels, (1, kw), (1, sw), pads[1], (1, dw), bias=bias, **of)

    @classmethod
    def like(cls, layer: nn.Conv2d, rank: int) -> SpatialConv2d:
        """Build a layer of the same geometry as `layer`; weights are not copied."""
        return cls(**_arguments(layer), rank=rank).train(layer.training)

    def dense_weight(self) -> Tensor:
        """Return the product as the weight (out, in / groups, kh, kw) of one Conv2d."""
        a = self.a.weight.reshape(self.groups, self.rank, *self.a.weight.shape[1:3])
        b = self.b.weight.reshape(self.groups, -1, self.rank, self.kernel_size[1])
        return torch.einsum("gorx,griy->goiyx", b, a).flatten(0, 1)

    def config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as JSON."""
        return {**self._geometry(), "rank": self.rank}

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out_channels, H', W') for (N, in_channels, H, W)."""
        output: Tensor = self.b(self.a(input))
        return output


class Tucker2Conv2d(_LowRankConv2d):
    """A Conv2d as three: `a`, 1x1 to rank_in channels; `core`, kernel height x width to rank_out; `b`, 1x1 to out.

    Only `b` has a bias. A grouped convolution is factorized in each group, with rank_in and rank_out channels for
    each. Stride, padding and dilation are the core's: exact, since a 1x1 convolution without bias keeps zeros zero.

    Shapes, g = groups: `a.weight` (g rank_in, in/g, 1, 1), `core.weight` (g rank_out, rank_in, kh, kw),
    `b.weight` (out, rank_out, 1, 1); W[o, i] = sum over s, r of b[o, s] core[s, r] a[r, i] within the group of o.
    Parameters: rank_in * in + g * rank_in * rank_out * kh * kw + rank_out * out instead of out * in/g * kh * kw.
    Multiply-accumulates: those of `a` at the input's positions, the others at the output's.

    Example:
        >>> import torch
        >>> from omgoptim.blocks import Tucker2Conv2d
        >>> layer = Tucker2Conv2d(32, 64, 3, rank_in=8, rank_out=16, padding=1)
        >>> tuple(layer.core.weight.shape)
        (16, 8, 3, 3)
        >>> layer(torch.randn(2, 32, 8, 8)).shape
        torch.Size([2, 64, 8, 8])

    Raises:
        ValueError: a rank is not in 1..in/g or 1..out/g, or a geometry that it has no exact form for.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        rank_in: int,
        rank_out: int,
        **options: Unpack[ConvOptions],
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, options)
        o, i, _, _ = self.group_shape
        _check_rank("rank_in", rank_in, i)
        _check_rank("rank_out", rank_out, o)
        self.rank_in, self.rank_out = rank_in, rank_out
        inside, outside = self.groups * rank_in, self.groups * rank_out
        of = {"groups": self.groups, **placement(options)}
        self.a = nn.Conv2d(in_channels, inside, 1, bias=False, **of)
        self.core = nn.Conv2d(
            inside, outside, self.kernel_size, self.stride, self.padding, self.dilation, bias=False, **of
        )
        self.b = nn.Conv2d(outside, out_channels, 1, bias=options.get("bias", True), **of)

    @classmethod
    def like(cls, layer: nn.Conv2d, rank_in: int, rank_out: int) -> Tucker2Conv2d:
        """Build a layer of the same geometry as `layer`; weights are not copied."""
        return cls(**_arguments(layer), rank_in=rank_in, rank_out=rank_out).train(layer.training)

    def dense_weight(self) -> Tensor:
        """Return the product as the weight (out, in / groups, kh, kw) of one Conv2d."""
        a = self.a.weight.reshape(self.groups, self.rank_in, -1)
        core = self.core.weight.reshape(self.groups, self.rank_out, self.rank_in, *self.kernel_size)
        b = self.b.weight.reshape(self.groups, -1, self.rank_out)
        return torch.einsum("gos,gsryx,gri->goiyx", b, core, a).flatten(0, 1)

    def config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as JSON."""
        return {**self._geometry(), "rank_in": self.rank_in, "rank_out": self.rank_out}

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out_channels, H', W') for (N, in_channels, H, W)."""
        output: Tensor = self.b(self.core(self.a(input)))
        return output


def _pair(value: Numbers) -> Pair:
    height, width = sizes(value, 2)
    return height, width


def _check_rank(name: str, rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"{name} must be between 1 and {most}, not {rank}")


def _arguments(layer: nn.Conv2d) -> dict[str, Any]:
    """Return the arguments that a convolution was built with."""
    return geometry_of(layer, "groups", "padding_mode") | {"bias": layer.bias is not None}
