"""Fake quantization: int8 weights and inputs simulated while a module trains.

The weights of convolutions and Linear layers and their inputs are rounded to int8 values in the forward only; the
gradient passes unchanged (straight-through) and is zero where an input lies outside its range. The module itself stays
plain: rounded weights and hooks exist only during a forward.

Weights: symmetric, s = max|w| / 127 over an output channel. Such a scale follows its channel when batch normalization
is folded into it, so that rounding and folding commute, and nothing is folded while training. With one scale for the
whole weight they do not, and what is simulated is only near to what is converted. Inputs: one range a tensor, read on
calibration data, then a moving average of the batches', then fixed. Where conversion will scale the channels of an
input evenly, given factors stand for that: x~ = s rounded(x / s), w~ = rounded(w s) / s, s one factor a channel.
Not simulated: what is added, concatenated or pooled between layers, biases, attention's own products, LSTM and GRU.
`torch.ao.quantization` is not used: it is deprecated, and swaps layers for its own, which have to be swapped back.

Sources: Jacob et al. 2017, arXiv:1712.05877, section 3 (simulated quantization, ranges); Bengio et al. 2013,
arXiv:1308.3432 (straight-through). Differs: batch normalization is frozen after a third of the steps, not folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from omgoptim.errors import TechniqueError
from omgoptim.models.forward import attached
from omgoptim.models.globs import is_selected
from omgoptim.training.modes import eval_mode

NORMS_FROZEN = 1 / 3
"""Fraction of the steps after which batch normalization uses its running statistics, as once it is folded; three of
eight epochs in PyTorch's static quantization tutorial."""

RANGES_FIXED = 2 / 3
"""Fraction of the steps after which ranges stay; four of eight epochs in PyTorch's tutorial. Chosen: better ranges."""

MOMENTUM = 0.01
"""Weight of a batch in the moving average of a range: `averaging_constant` of torch.ao's moving-average observer."""

Simulated = nn.Linear | _ConvNd


@dataclass(frozen=True, slots=True)
class IntegerFormats:
    """Integer formats of the simulation."""

    per_channel: bool = True
    """One scale per output channel of a weight, or one for the whole weight."""
    symmetric: bool = False
    """Inputs in -128..127 with zero point 0, or in 0..255 with one."""
    weight_levels: int = 127
    """Largest integer of a weight; 64 where products of 8 bits would overflow."""
    targets: Sequence[str] = field(default_factory=tuple)
    ignore: Sequence[str] = field(default_factory=tuple)
    """Globs on paths of layers."""
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    """Layer path to the positive factors by which conversion divides its input channels, (input channels)."""


class _Rounded(torch.autograd.Function):
    """The function (clamp(round(x / s) + z, low, high) - z) x s, as QuantizeLinear and DequantizeLinear compute it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        """Quantize and dequantize `x`; keep where it lies inside the range."""
        levels = torch.round(x / scale).add_(zero)
        ctx.save_for_backward((levels >= low) & (levels <= high))
        return levels.clamp_(low, high).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Quantize and dequantize, halves to even; the gradient is 1 inside the range and 0 outside.

    Args:
        x: any shape, floating.
        scale: the step, above 0; broadcast against x.
        zero: the integer, in floating point, that stands for 0; broadcast against x.
        low: the smallest integer.
        high: the largest integer.

    Returns:
        Of x's shape and dtype; computed in float32.
    """
    rounded: Tensor = _Rounded.apply(x.float(), scale, zero, low, high)  # type: ignore[no-untyped-call]
    return rounded.to(x.dtype)


def weight_scale(weight: Tensor, axis: int | None, levels: int = 127) -> Tensor:
    """Return max|w| / levels over all but `axis` (over everything for None), shaped to broadcast; 1 where all is 0."""
    size = weight.detach().float().abs()
    if axis is None:
        largest = size.amax()
    else:
        reduced = [dim for dim in range(weight.ndim) if dim != axis]
        largest = size.amax(reduced, keepdim=True) if reduced else size
    scale = largest / levels
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def input_scale(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of inputs between low and high, a range that is extended to 0.

    Unsigned: s = (high - low) / 255, z = round(-low / s). Symmetric: s = max(-low, high) / 127, z = 0.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.zeros_like(scale) if symmetric else torch.round(-low / scale)


class FakeQuantized(nn.Module):
    """Module whose forward simulates int8; `module` is the plain one, with unrounded weights.

    In train mode it counts its forwards, updates the ranges of inputs and, later, freezes batch normalization; the
    state of all this is in buffers, so that checkpoints include it.

    Args:
        module: not copied; its weights are what is trained.
        steps: forwards in train mode that a whole training has.

    Raises:
        TechniqueError: no layer can be simulated.
    """

    steps_done: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, module: nn.Module, simulation: IntegerFormats, steps: int) -> None:
        super().__init__()
        self.module, self.simulation, self.steps = module, simulation, steps
        self.layers = _simulated(module, simulation)
        self.norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self._calibrating = False
        count = len(self.layers)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("low", torch.full((count,), torch.inf))
        self.register_buffer("high", torch.full((count,), -torch.inf))
        for index, (path, layer) in enumerate(self.layers.items()):
            factors = simulation.factors.get(path)
            channels = layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features
            if factors is not None and len(factors) == channels:
                self.register_buffer(f"factors_{index}", factors.float())

    @property
    def observes(self) -> bool:
        """Return whether forwards update the ranges of inputs."""
        return self.training and int(self.steps_done) <= RANGES_FIXED * self.steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with simulated int8 weights and inputs."""
        if self.training:
            self.steps_done += 1
            if int(self.steps_done) > NORMS_FROZEN * self.steps:
                for norm in self.norms:
                    norm.training = False
        with attached(self._hooks(self.observes)):
            return functional_call(self.module, self.rounded_weights(), args, kwargs)

    def rounded_weights(self) -> dict[str, Tensor]:
        """Return the dequantized value of each simulated weight by name."""
        simulation, rounded = self.simulation, {}
        levels = simulation.weight_levels
        for index, (path, layer) in enumerate(self.layers.items()):
            axis = int(isinstance(layer, _ConvTransposeNd)) if simulation.per_channel else None
            factors = self._buffers.get(f"factors_{index}")
            read = None if factors is None else _of_weight(factors, layer)
            weight = layer.weight if read is None else layer.weight * read
            scale = weight_scale(weight, axis, levels)
            made = fake_quantize(weight, scale, torch.zeros_like(scale), -levels, levels)
            rounded[f"{path}.weight" if path else "weight"] = made if read is None else made / read
        return rounded

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return the lowest and highest input, channels scaled, of each layer that was reached, by path."""
        pairs = zip(self.layers, self.low.tolist(), self.high.tolist(), strict=True)
        return {path: (min(low, 0.0), max(high, 0.0)) for path, low, high in pairs if math.isfinite(low)}

    @torch.no_grad()
    def calibrate(self, calls: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]], device: str = "cpu") -> None:
        """Observe the smallest and largest input of each layer over these calls of the float module, in eval mode.

        Args:
            calls: arguments on the device.
            device: that the float module is run on.
        """
        self._calibrating = True
        try:
            with eval_mode(self, device), attached(self._hooks(True)):
                for args, kwargs in calls:
                    self.module(*args, **kwargs)
        finally:
            self._calibrating = False

    def _hooks(self, observes: bool) -> Iterator[RemovableHandle]:
        for index, layer in enumerate(self.layers.values()):
            yield layer.register_forward_pre_hook(self._before(index, observes), with_kwargs=True)

    def _before(self, index: int, observes: bool) -> Callable[..., Any]:
        """Return the pre-hook that fake-quantizes a layer's input, positional or keyword."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            spatial = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
            if args:
                return (self._input(index, args[0], spatial, observes), *args[1:]), kwargs
            return args, {**kwargs, "input": self._input(index, kwargs["input"], spatial, observes)}

        return hook

    def _input(self, index: int, x: Tensor, spatial: int, observes: bool) -> Tensor:
        """Fake-quantize a layer's input.

        Args:
            index: of the layer.
            x: the layer's input, the channels on axis 1, or last without spatial dimensions.
            spatial: dimensions behind that of the channels.
            observes: whether the range follows this input.
        """
        if not x.is_floating_point() or not x.numel():
            return x
        factors = self._buffers.get(f"factors_{index}")
        if factors is not None:
            factors = factors.reshape(-1, *[1] * spatial)
            x = x / factors
        if observes:
            self._observe(index, *torch.aminmax(x.detach().float()))
        if self._calibrating or not bool(torch.isfinite(self.low[index])):  # a layer that no calibration sample reached
            return x if factors is None else x * factors
        scale, zero = input_scale(self.low[index], self.high[index], self.simulation.symmetric)
        bounds = (-128, 127) if self.simulation.symmetric else (0, 255)
        rounded = fake_quantize(x, scale, zero, *bounds)
        return rounded if factors is None else rounded * factors

    def _observe(self, index: int, low: Tensor, high: Tensor) -> None:
        """Update the range: the widest while calibrating, a moving average while training."""
        if self._calibrating or not bool(torch.isfinite(self.low[index])):
            self.low[index] = torch.minimum(self.low[index], low)
            self.high[index] = torch.maximum(self.high[index], high)
        else:
            self.low[index].lerp_(low, MOMENTUM)
            self.high[index].lerp_(high, MOMENTUM)


def _simulated(module: nn.Module, simulation: IntegerFormats) -> dict[str, Simulated]:
    """Return the simulated layers by path."""
    found: dict[str, Simulated] = {}
    for path, layer in module.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, (nn.Linear, _ConvNd)) else None
        if isinstance(layer, (nn.Linear, _ConvNd)) and weight is not None and weight.is_floating_point():
            found[path] = layer
    chosen = {
        path: layer for path, layer in found.items() if is_selected([path], simulation.targets, simulation.ignore)
    }
    if chosen:
        return chosen
    if found:
        raise TechniqueError(
            "targets and ignore exclude every layer that QAT supports",
            f"none of the {len(found)} convolutions and Linear layers is selected",
            "widen targets or narrow ignore",
        )
    raise TechniqueError(
        "the model has no layer that QAT supports",
        "it has no convolution or Linear layer with a weight that is a parameter of its own",
        "use scheme dynamic or weight_only, which need no training",
    )


def _of_weight(factors: Tensor, layer: Simulated) -> Tensor:
    """Return the factors of the input channels, (C), shaped to broadcast against the weight that reads them."""
    if not isinstance(layer, _ConvNd):
        return factors
    ones = [1] * len(layer.kernel_size)
    if isinstance(layer, _ConvTransposeNd):  # (C, output channels of a group, ...)
        return factors.reshape(-1, 1, *ones)
    by_group = factors.reshape(layer.groups, -1)  # a weight is (output channels, C of a group, ...)
    return by_group.repeat_interleave(layer.out_channels // layer.groups, 0).reshape(layer.out_channels, -1, *ones)
