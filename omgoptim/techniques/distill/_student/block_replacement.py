"""Replacement of dense convolutions by smaller blocks, fitted in closed form to the convolutions' outputs.

The final 1x1 convolution of a block is fitted by ridge regression, without labels: its inputs are those in the model
with blocks, its targets the outputs of the dense convolution in the original model. The norms of an inverted residual
get the statistics of their inputs, and its weights compensate for them, so that training and evaluation mode give the
same outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from omgoptim.blocks.depth_separable import DepthSeparableConv
from omgoptim.blocks.inverted_residual import MIDDLE, InvertedResidual
from omgoptim.errors import TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.measure.size import count_params
from omgoptim.models.forward import attached
from omgoptim.reports import Change, Skip
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.factorize._low_rank.problem import replace_layer
from omgoptim.techniques.probe import (
    EXCLUDED,
    NOT_RUN,
    WHOLE_MODEL,
    frozen_or_shared,
    layer_calls,
    parameter_owners,
    quiet_output,
    replacement_refusal,
)
from omgoptim.techniques.prune._reconstruction import reconstruct_channels
from omgoptim.techniques.registry import ModuleRun, Outcome, Refusal
from omgoptim.training.batch_norm import reestimate

Conv = nn.Conv1d | nn.Conv2d
Block = DepthSeparableConv | InvertedResidual

SWEEPS = 2
"""Sweeps over all blocks: the second fits on the inputs that the first gives. Chosen: each costs a pass."""


MIN_VARIANCE = 0.01
"""Lower bound of a channel's variance relative to the mean. Chosen: less amplifies dead channels, more damps live."""

MakeBlock = Callable[[Conv], Block]
"""Function from a convolution to the block that can replace it."""

MIN_INPUTS = 5
"""Minimum input channels of a replaced convolution: image stems (1, 3 or 4 channels) keep theirs."""


class _DensePart(nn.Module):
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
    copied = copy.deepcopy(module)
    for path, block in blocks.items():
        conv: Any = copied.get_submodule(path)
        replace_layer(copied, path, _DensePart(_fitted_part(block), conv))
    return copied


class _CentredReLU6(nn.ReLU6):
    """ReLU6 less the middle of its range, about its mean output: ridge regression shrinks towards zero."""

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
        block.activation = _CentredReLU6()
    for _ in range(SWEEPS if inverted else 1):
        _set_norm_statistics(module, inverted, run)
        reconstruct_channels(module, dense, parts, run)
    _set_norm_statistics(module, inverted, run)
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
def _set_norm_statistics(module: nn.Module, blocks: Sequence[InvertedResidual], run: ModuleRun) -> None:
    """Set the statistics of the blocks' norms without changing the blocks' outputs.

    `project` compensates for the first norms' scaling, and the last norm reproduces its input.
    """
    observed = _input_statistics(module, [norm for block in blocks for norm in _norms(block)], run)
    for block in blocks:
        scale, mean = _unit_scale_and_mean(block)
        before = _first_scale(block)
        for norm in _norms(block):
            norm.running_mean.copy_(observed[norm][0])
            norm.running_var.copy_(observed[norm][1])
        if len(block.expand):
            first: Any = block.expand[1]  # scales only: zero stays zero, which is what the borders are padded with
            first.bias.copy_(first.weight * first.running_mean / (first.running_var + first.eps).sqrt())
        middle, last = block.norm, cast(Any, block.project_norm)
        change = _first_scale(block) / before  # of all that `depthwise` gets
        cast(Tensor, middle.running_mean).mul_(change)
        cast(Tensor, middle.running_var).mul_(change.square())
        last.weight.copy_((last.running_var + last.eps).sqrt())
        last.bias.copy_(last.running_mean)
        new_scale, new_mean = _unit_scale_and_mean(block)
        assert block.project.bias is not None
        block.project.bias += block.project.weight.flatten(1) @ (scale * (new_mean - mean))
        block.project.weight.mul_((scale / new_scale).reshape(1, -1, *[1] * block.dims))


def _norms(block: InvertedResidual) -> list[Any]:
    return [*([block.expand[1]] if len(block.expand) else []), block.norm, block.project_norm]


def _input_statistics(
    module: nn.Module, layers: Sequence[nn.Module], run: ModuleRun
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Return mean and variance (channels,) of each layer's input on the run's statistics, in eval mode."""
    sums: dict[nn.Module, Tensor] = {}

    def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().transpose(0, 1).flatten(1).double()  # (channels, positions)
        each = torch.stack([rows.new_full(rows.shape[:1], rows.shape[1]), rows.sum(1), rows.square().sum(1)])
        sums[layer] = sums[layer] + each if layer in sums else each

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    with attached(hooks), evaluation_mode(module), quiet_output():
        for args, kwargs, _ in run.calls():
            module(*args, **kwargs)
    found = {}
    for layer, (count, total, squares) in sums.items():
        mean = total / count
        variance = squares / count - mean.square()
        found[layer] = mean, variance.clamp_min(MIN_VARIANCE * float(variance.mean()))
    return found


def _first_scale(block: InvertedResidual) -> Tensor:
    """Return the scale of each input of `depthwise`, (hidden,)."""
    if not len(block.expand):
        return torch.ones_like(block.norm.weight)
    first: Any = block.expand[1]
    return cast(Tensor, first.weight / (first.running_var + first.eps).sqrt())


def _unit_scale_and_mean(block: InvertedResidual) -> tuple[Tensor, Tensor]:
    """Return scale and mean, (hidden,) each: the norms give scale * (unit - mean) of a unit before `project` reads it.

    The unit is the output of `depthwise` for the block's input without any scaling.
    """
    norm: Any = block.norm
    before = _first_scale(block)
    return before * norm.weight / (norm.running_var + norm.eps).sqrt(), norm.running_mean / before


@dataclass(frozen=True, slots=True)
class BlockNames:
    """Names of a replacement in reports."""

    what: str
    """`depthwise`, in a change."""
    kind: str
    """Phrase for the block: `a depthwise-separable convolution`."""


def replace_convolutions(
    module: nn.Module, make: MakeBlock, names: BlockNames, selection: LayerSelection, run: ModuleRun, *, fit: bool
) -> Outcome:
    """Replace every dense convolution whose block is smaller, in place.

    Args:
        module: changed in place.
        make: gives the block; called for every convolution that could be replaced.
        names: names of the block in reports.
        selection: the layers that globs allow.
        run: how the module is called, and its batches.
        fit: whether each block is fitted to give what the convolution gave, on the run's inputs where they are real.

    Returns:
        The convolutions that were replaced, and the others with the reason.

    Raises:
        TechniqueError: none was replaced.
    """
    found, skipped = _find_replaceable(module, selection, run)
    blocks: dict[str, Block] = {}
    changed = []
    for path, conv in found.items():
        block = make(conv)
        before, after = (count_params(each)[0] for each in (conv, block))
        if after >= before:
            reason = f"{names.kind} would have {after:,} parameters, not fewer than its {before:,}"
            skipped.append(Skip(path=path, reason=reason, kind="no_benefit"))
            continue
        blocks[path] = block
        shape = " x ".join(map(str, conv.weight.shape))
        changed.append(Change(path=path, what=names.what, before=shape, after=f"{after:,} of {before:,} parameters"))
    if not blocks:
        raise _nothing_to_replace(names, skipped)
    dense = with_dense(module, blocks) if fit and run.real else None
    for path, block in blocks.items():
        replace_layer(module, path, block)
    if dense is not None:
        fit_blocks(module, dense, blocks, run)
    return Outcome(changed, skipped)


def _nothing_to_replace(names: BlockNames, skipped: list[Skip]) -> TechniqueError:
    reasons = [f"{skip.path}: {skip.reason}" for skip in skipped[:3]]
    return TechniqueError(
        f"no convolution of this model can be replaced by {names.kind}",
        "; ".join(reasons) or "it has no convolution",
        "use student narrow (removes channels of any layer), fewer_layers or low_rank, or give your own student",
    )


def _find_replaceable(
    module: nn.Module, selection: LayerSelection, run: ModuleRun
) -> tuple[dict[str, Conv], list[Skip]]:
    found: dict[str, Conv] = {}
    skipped = []
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, _ConvNd)}
    owners, called = parameter_owners(module), layer_calls(module, layers, run)
    for path, layer in layers.items():
        refusal = _refusal(path, layer, selection, owners) or (None if path in called else NOT_RUN)
        if refusal:
            skipped.append(refusal.skip(path))
        else:
            found[path] = layer  # type: ignore[assignment]
    return found, skipped


def _refusal(
    path: str, layer: _ConvNd, selection: LayerSelection, owners: Mapping[int, list[tuple[int, str]]]
) -> Refusal | None:
    if not path:
        return WHOLE_MODEL
    if not selection.includes(path):
        return EXCLUDED
    reason = ""
    if layer.transposed or not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        reason = f"only Conv1d and Conv2d have such a block, not {type(layer).__name__}"
    elif layer.groups > 1:
        reason = f"already grouped ({layer.groups} groups)"
    elif prod(layer.kernel_size) == 1:
        reason = "kernel of size 1: no spatial part to separate"
    elif layer.padding_mode != "zeros":
        reason = f"its padding_mode is {layer.padding_mode}; the blocks support zeros only"
    elif layer.in_channels < MIN_INPUTS and not selection.targets:
        reason = f"too few input channels ({layer.in_channels}); name it in targets to replace it anyway"
    if reason:
        return Refusal(reason, "unsupported")
    return replacement_refusal(layer) or frozen_or_shared(layer, owners)
