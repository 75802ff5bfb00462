"""Closed-form fit of replacement blocks to the outputs of the convolutions that they replace, without labels.

The 1x1 convolution that ends a block is fitted by ridge regression, as pruning does it, to what the dense convolution
gives in the model before, on what it reads in the model with blocks. An inverted residual's norms are given the
statistics of what they get, and its weights make up for that, so that it gives the same in training and in evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from omgoptim.blocks.depth_separable import DepthSeparableConv
from omgoptim.blocks.inverted_residual import MIDDLE, InvertedResidual
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.techniques.factorize._low_rank.replacement import put
from omgoptim.techniques.probe import quiet
from omgoptim.techniques.prune._channels.channel_reconstruction import reconstruct_channels
from omgoptim.techniques.registry import ModuleRun
from omgoptim.training.batch_norm import reestimate

Conv = nn.Conv1d | nn.Conv2d
Block = DepthSeparableConv | InvertedResidual

FITS = 2
"""Sweeps of fitting all blocks, each on inputs of blocks that were fitted before."""


LEAST_VARIANCE = 0.01
"""Lower bound of a channel's variance relative to the mean over channels: keeps dead channels from being amplified."""


class _Standing(nn.Module):
    """Container of a dense convolution under the name of the block's fitted part."""

    def __init__(self, name: str, conv: Conv) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, conv)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._modules[self.name](input)  # type: ignore[misc]
        return output


def _fitted_part(block: Block) -> str:
    return "project" if isinstance(block, InvertedResidual) else "pointwise"


def with_dense(module: nn.Module, blocks: Mapping[str, Block]) -> nn.Module:
    """Return a copy of the original module, with each convolution at the path of its block's fitted part."""
    twin = copy.deepcopy(module)
    for path, block in blocks.items():
        conv: Any = twin.get_submodule(path)
        put(twin, path, _Standing(_fitted_part(block), conv))
    return twin


class _Centred(nn.ReLU6):
    """Return ReLU6 less the middle of its range, about its mean output: ridge regression shrinks towards zero."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - MIDDLE


def fit_blocks(module: nn.Module, dense: nn.Module, blocks: Mapping[str, Block], run: ModuleRun) -> None:
    """Fit the last part of every block to the convolution's outputs, by ridge regression.

    An inverted residual's is fitted with a bias, on centred inputs; both are absorbed by the norm behind it afterwards.
    """
    nothing = torch.empty(0, dtype=torch.long)
    parts = {(f"{path}.{_fitted_part(block)}", "in"): nothing for path, block in blocks.items()}
    inverted = [block for block in blocks.values() if isinstance(block, InvertedResidual)]
    for block in inverted:
        block.project.bias = nn.Parameter(block.project_norm.bias.detach() + _middle(block))
        nn.init.zeros_(block.project_norm.bias)
        block.activation = _Centred()
    for _ in range(FITS if inverted else 1):
        _settle(module, inverted, run)
        reconstruct_channels(module, dense, parts, run)
    _settle(module, inverted, run)
    for block in inverted:
        bias, mean = block.project.bias, block.project_norm.running_mean
        assert bias is not None
        assert mean is not None
        mean += _middle(block) - bias.detach()
        block.project.bias, block.activation = None, nn.ReLU6()
    reestimate(module, run.signature, run.statistics)


def _middle(block: InvertedResidual) -> Tensor:
    """Return what `project` gives for the middle of ReLU6's range, (out,)."""
    return MIDDLE * block.project.weight.detach().flatten(1).sum(1)


@torch.no_grad()
def _settle(module: nn.Module, blocks: Sequence[InvertedResidual], run: ModuleRun) -> None:
    """Set the statistics of the blocks' norms without changing the blocks' outputs.

    `project` compensates for the first norms' scaling, and the last norm reproduces its input.
    """
    observed = _observed(module, [norm for block in blocks for norm in _norms(block)], run)
    for block in blocks:
        scale, mean = _units(block)
        before = _first_scale(block)
        for norm in _norms(block):
            norm.running_mean.copy_(observed[norm][0])
            norm.running_var.copy_(observed[norm][1])
        if len(block.expand):
            first: Any = block.expand[1]  # scales only: zero stays zero, which is what the borders are padded with
            first.bias.copy_(first.weight * first.running_mean / (first.running_var + first.eps).sqrt())
        own, last = block.norm, cast(Any, block.project_norm)
        change = _first_scale(block) / before  # of all that `depthwise` gets
        cast(Tensor, own.running_mean).mul_(change)
        cast(Tensor, own.running_var).mul_(change.square())
        last.weight.copy_((last.running_var + last.eps).sqrt())
        last.bias.copy_(last.running_mean)
        new_scale, new_mean = _units(block)
        assert block.project.bias is not None
        block.project.bias += block.project.weight.flatten(1) @ (scale * (new_mean - mean))
        block.project.weight.mul_((scale / new_scale).reshape(1, -1, *[1] * block.dims))


def _norms(block: InvertedResidual) -> list[Any]:
    return [*([block.expand[1]] if len(block.expand) else []), block.norm, block.project_norm]


def _observed(module: nn.Module, layers: Sequence[nn.Module], run: ModuleRun) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Return mean and variance (channels,) of each layer's input on the run's statistics, in eval mode."""
    sums: dict[nn.Module, Tensor] = {}

    def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().transpose(0, 1).flatten(1).double()  # (channels, positions)
        each = torch.stack([rows.new_full(rows.shape[:1], rows.shape[1]), rows.sum(1), rows.square().sum(1)])
        sums[layer] = sums[layer] + each if layer in sums else each

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        with evaluation_mode(module), quiet():
            for args, kwargs, _ in run.calls():
                module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for layer, (count, total, squares) in sums.items():
        mean = total / count
        variance = squares / count - mean.square()
        found[layer] = mean, variance.clamp_min(LEAST_VARIANCE * float(variance.mean()))
    return found


def _first_scale(block: InvertedResidual) -> Tensor:
    """Return the scale of each input of `depthwise`, (hidden,)."""
    if not len(block.expand):
        return torch.ones_like(block.norm.weight)
    first: Any = block.expand[1]
    return cast(Tensor, first.weight / (first.running_var + first.eps).sqrt())


def _units(block: InvertedResidual) -> tuple[Tensor, Tensor]:
    """Return scale and mean, (hidden,) each: the norms give scale * (unit - mean) of a unit before `project` reads it.

    The unit is the output of `depthwise` for the block's input without any scaling.
    """
    own: Any = block.norm
    before = _first_scale(block)
    return before * own.weight / (own.running_var + own.eps).sqrt(), own.running_mean / before
