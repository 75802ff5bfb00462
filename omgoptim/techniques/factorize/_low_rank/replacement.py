"""Conversion of a layer to its approximation problem, and of factors to the block that replaces it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omgoptim.blocks import LowRankLinear, SpatialConv2d, Tucker2Conv2d
from omgoptim.techniques.factorize._low_rank.problem import Option, Problem
from omgoptim.techniques.factorize._low_rank.second_moments import InputMoments, groups_of
from omgoptim.techniques.reconstruction.rows import DenseLayer

Block = LowRankLinear | SpatialConv2d | Tucker2Conv2d


def weight_of(layer: DenseLayer) -> Tensor:
    """Return a layer's weight as (groups, out, in, kernel height, kernel width), float64."""
    weight = layer.weight.detach().double()
    if weight.dim() == 2:
        weight = weight[..., None, None]
    groups = groups_of(layer)
    return weight.reshape(groups, -1, *weight.shape[1:])


def problem_of(
    layer: DenseLayer, moments: InputMoments, influence: Tensor | None, weight: Tensor | None = None
) -> Problem:
    """Return a layer's approximation problem: centred where it has a bias, which absorbs the mean input's output.

    Args:
        layer: its bias decides.
        moments: of the inputs.
        influence: of its outputs; None if unknown.
        weight: what to approximate, as `weight_of`; the layer's own by default.
    """
    weight = weight_of(layer) if weight is None else weight
    second, outputs = moments.second, moments.outputs
    if layer.bias is not None:
        if second is not None:
            second = second - moments.mean[:, :, None] * moments.mean[:, None, :]
        if outputs is not None:
            given = torch.einsum("gon,gn->go", weight.flatten(2), moments.mean)
            outputs = outputs - given[:, :, None] * given[:, None, :]
    return Problem(weight, second, outputs, influence)


def unusable(moments: InputMoments) -> str | None:
    """Return why the moments of a layer's inputs cannot be used, or None."""
    if not moments.rows:
        return "the calibration samples give it no input but padding"
    if not moments.are_finite:
        return "its inputs on the calibration samples hold NaN or infinity"
    return None


def empty_block(layer: DenseLayer, option: Option) -> Block:
    """Build a block of an option's ranks in place of a layer, with torch's initial weights."""
    if isinstance(layer, nn.Linear):
        return LowRankLinear.like(layer, *option.ranks)
    if option.form == "tucker2":
        return Tucker2Conv2d.like(layer, *option.ranks)
    return SpatialConv2d.like(layer, *option.ranks)


def block_of(layer: DenseLayer, option: Option, factors: Sequence[Tensor], bias: Tensor | None) -> Block:
    """Build the block that replaces a layer, in its mode, dtype and device, trainable if the layer is.

    Args:
        layer: what it replaces.
        option: form and ranks.
        factors: as `forms.solve` gives them.
        bias: (out,), where the layer has one.
    """
    block = empty_block(layer, option)
    with torch.no_grad():
        for part, factor in zip(block.children(), factors, strict=True):
            weight = part.weight
            assert isinstance(weight, Tensor)  # each part is a Linear or a convolution
            weight.copy_(factor.reshape(weight.shape))
        if block.b.bias is not None and bias is not None:
            block.b.bias.copy_(bias)
    return block.requires_grad_(layer.weight.requires_grad)


def product_of(block: Block) -> Tensor:
    """Return the weight that a block represents, in the form of `weight_of`."""
    weight = block.dense_weight().detach().double()
    if weight.dim() == 2:
        weight = weight[..., None, None]
    groups = 1 if isinstance(block, LowRankLinear) else block.groups
    return weight.reshape(groups, -1, *weight.shape[1:])


def put(module: nn.Module, path: str, block: nn.Module) -> None:
    """Replace the layer at `path`, and keep PyTorch's fused encoder from reading its weight.

    nn.TransformerEncoderLayer would pass the dense product to one kernel, which is right but slower than before.
    """
    old = module.get_submodule(path)
    places = [(parent, name) for parent in module.modules() for name, part in parent._modules.items() if part is old]
    for parent, name in places:
        parent._modules[name] = block
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its word for: not one that the kernel knows
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(layer, nn.TransformerEncoderLayer) and layer.activation_relu_or_gelu == 0
            for layer in encoder.layers
        ):
            encoder.use_nested_tensor = False
