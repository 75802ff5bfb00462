"""Low-rank approximation problem of one layer, its candidate ranks, and the block that replaces the layer.

A layer's weight is (groups, out, in, kernel height, kernel width) here, a Linear's and a 1x1 convolution's too, so that
grouped convolutions are factorized in each group, all with the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from omgoptim.blocks import LowRankLinear, SpatialConv2d, Tucker2Conv2d
from omgoptim.techniques.factorize._low_rank.second_moments import InputMoments, groups_of
from omgoptim.techniques.reconstruction.inputs import DenseLayer
from omgoptim.techniques.reconstruction.least_squares import INFLUENCE_DAMPING, INPUT_DAMPING, cholesky, squared_error
from omgoptim.techniques.registry import Refusal

Form = Literal["linear", "spatial", "tucker2"]

Block = LowRankLinear | SpatialConv2d | Tucker2Conv2d


@dataclass(frozen=True, slots=True)
class RankOption:
    """Ranks that a layer could have."""

    form: Form
    ranks: tuple[int, ...]
    """Rank of a Linear or a spatial convolution; rank in and rank out of tucker2."""
    params: int
    """Parameters of the factors, without the bias."""
    error: float
    """Squared error of the layer's output: E|R.T (W - W') x|² over a sample, an estimate for convolutions."""

    def __str__(self) -> str:
        kind = {"linear": "rank", "spatial": "spatial, rank", "tucker2": "tucker2, ranks"}[self.form]
        return f"{kind} {' and '.join(map(str, self.ranks))}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A weight, and the metric in which its approximation is measured."""

    weight: Tensor
    """(groups, out, in, kernel height, kernel width), float64."""
    moment: Tensor | None = None
    """E[x xᵀ] of the inputs, centred where a bias takes up the mean: (groups, n, n), n = in * height * width. None:
    all inputs count the same."""
    outputs: Tensor | None = None
    """Used instead where n is too large: E[y yᵀ], (groups, out, out). Linear and 1x1 only."""
    influence: Tensor | None = None
    """Influence of the outputs on the model's: (groups, out, out). None: all the same."""
    roots: dict[str, list[Tensor]] = field(default_factory=dict)
    """Cached Cholesky factors."""

    @property
    def groups(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel(self) -> tuple[int, int]:
        return self.weight.shape[3], self.weight.shape[4]

    def matrix(self, group: int) -> Tensor:
        """Return the weight of a group as the matrix (out, n)."""
        return self.weight[group].flatten(1)

    def inputs_root(self, group: int) -> Tensor | None:
        """Return S of the whole moment, (n, n)."""
        return None if self.moment is None else self._root("inputs", self.moment, INPUT_DAMPING, group)

    def influence_root(self, group: int) -> Tensor | None:
        """Return R, (out, out)."""
        return None if self.influence is None else self._root("influence", self.influence, INFLUENCE_DAMPING, group)

    def part_root(self, part: Literal["channels", "rows"], group: int) -> Tensor | None:
        """Return S of the moment of the channels (in, in), or of channels x kernel height, averaged over the rest."""
        if self.moment is None:
            return None
        if part not in self.roots:
            kept, (height, width) = self.weight.shape[2], self.kernel
            side = (height, width) if part == "rows" else (1, height * width)
            n = kept * side[0]
            blocks = self.moment.reshape(self.groups, n, side[1], n, side[1])
            averaged = torch.einsum("gixjx->gij", blocks) / side[1]
            self.roots[part] = [cholesky(block_moment, INPUT_DAMPING) for block_moment in averaged]
        return self.roots[part][group]

    def _root(self, name: str, moment: Tensor, damping: float, group: int) -> Tensor:
        if name not in self.roots:
            self.roots[name] = [cholesky(group_moment, damping) for group_moment in moment]
        return self.roots[name][group]

    def error(self, change: Tensor) -> float:
        """Return E|R.T D x|² for a change D of the weight, in its shape. Without moments: of white inputs."""
        total = 0.0
        for group in range(self.groups):
            moment = None if self.moment is None else self.moment[group]
            total += squared_error(change[group].flatten(1), moment, self.influence_root(group))
        return total

    @property
    def energy(self) -> float:
        """Return the energy of its whole output, in the units of `error`."""
        if self.outputs is None:
            return self.error(self.weight)
        total = 0.0
        for group in range(self.groups):
            root = self.influence_root(group)
            moment = self.outputs[group]
            total += float((moment if root is None else root.mT @ moment @ root).trace())
        return total


def options_by_rank(form: Form, costs: Sequence[float], params_per_rank: int, round_to: int) -> list[RankOption]:
    """Return the options of a form with one rank, the smallest first.

    Args:
        form: linear or spatial.
        costs: squared singular values, the largest first; what a rank costs is the sum of those after it.
        params_per_rank: what one more rank adds.
        round_to: ranks are multiples of it; the full rank is one too.
    """
    errors = [0.0]
    for cost in reversed(costs):
        errors.append(errors[-1] + max(cost, 0.0))
    errors.reverse()
    full = len(costs)
    ranks = sorted({*range(round_to, full + 1, round_to), full})
    return [RankOption(form, (rank,), rank * params_per_rank, errors[rank]) for rank in ranks]


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
            mean_output = torch.einsum("gon,gn->go", weight.flatten(2), moments.mean)
            outputs = outputs - mean_output[:, :, None] * mean_output[:, None, :]
    return Problem(weight, second, outputs, influence)


def moments_refusal(moments: InputMoments) -> Refusal | None:
    """Return why the moments of a layer's inputs cannot be used, or None."""
    if not moments.rows:
        return Refusal("all of its inputs on the calibration samples are padding", "not_run")
    if not moments.are_finite:
        return Refusal("its inputs on the calibration samples contain NaN or infinity", "unsupported")
    return None


def empty_block(layer: DenseLayer, option: RankOption) -> Block:
    """Build a block of an option's ranks in place of a layer, with torch's initial weights."""
    if isinstance(layer, nn.Linear):
        return LowRankLinear.like(layer, *option.ranks)
    if option.form == "tucker2":
        return Tucker2Conv2d.like(layer, *option.ranks)
    return SpatialConv2d.like(layer, *option.ranks)


def block_of(layer: DenseLayer, option: RankOption, factors: Sequence[Tensor], bias: Tensor | None) -> Block:
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


def replace_layer(module: nn.Module, path: str, block: nn.Module) -> None:
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
