"""Convolution on a resized input: the input size of a network, scaled where its first layer reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from omgoptim.blocks.geometry import geometry_config


class ResizedConv2d(nn.Conv2d):
    """A Conv2d that scales its input's height and width first, bilinearly.

    In place of the first convolution it scales what every later layer computes on, about by the square of `scale`; the
    network takes the same inputs as before. Parameters are those of the convolution. Source: input resolution as a
    factor of compound scaling, EfficientNet, arXiv:1905.11946; differs in resizing inside the network.

    Shapes: input (N, in, H, W), resized to (N, in, round(scale H), round(scale W)); `weight` as of a Conv2d.

    Example:
        >>> import torch
        >>> from omgoptim.blocks import ResizedConv2d
        >>> layer = ResizedConv2d.like(torch.nn.Conv2d(3, 8, 3, padding=1), scale=0.5)
        >>> layer(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 8, 16, 16])

    Raises:
        ValueError: scale is not above 0.
    """

    def __init__(self, *args: Any, scale: float, **more: Any) -> None:
        super().__init__(*args, **more)
        if not scale > 0:
            raise ValueError(f"scale must be above 0, not {scale}")
        self.scale = scale

    @classmethod
    def like(cls, layer: nn.Conv2d, scale: float) -> ResizedConv2d:
        """Build a layer with the geometry and the very weights of a convolution."""
        resized = cls.from_config({**_config(layer), "scale": scale})
        resized.weight, resized.bias = layer.weight, layer.bias
        return resized.train(layer.training)

    def config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, as JSON."""
        return {**_config(self), "scale": self.scale}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ResizedConv2d:
        """Build a layer from its `config()`."""
        arguments: dict[str, Any] = {
            n: tuple(value) if isinstance(value, list) else value for n, value in config.items()
        }
        return cls(**arguments)

    def forward(self, input: Tensor) -> Tensor:
        """Resize the images (N, C, H, W) and convolve them."""
        size = [max(1, round(self.scale * length)) for length in input.shape[-2:]]
        return super().forward(F.interpolate(input, size=size, mode="bilinear", align_corners=False))

    def extra_repr(self) -> str:
        """Add the scale to the layer's description."""
        return f"{super().extra_repr()}, scale={self.scale}"  # type: ignore[no-untyped-call]


def _config(layer: nn.Conv2d) -> dict[str, Any]:
    return geometry_config(layer, "groups", "padding_mode") | {"bias": layer.bias is not None}
