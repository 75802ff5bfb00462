"""Replacement of dense convolutions by smaller blocks that approximate them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import nn
from torch.nn.modules.conv import _ConvNd

from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.reports import Change, Skip
from omgoptim.techniques.distill._student.block_fitting import Block, Conv, fit_blocks, with_dense
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.factorize._low_rank.replacement import put
from omgoptim.techniques.probe import NOT_RUN, Probe
from omgoptim.techniques.prune._channels.groups import owned_parameters
from omgoptim.techniques.registry import ModuleRun, Outcome

MakeBlock = Callable[[Conv], Block]
"""Function from a convolution to the block that can replace it."""

FEWEST_INPUTS = 5
"""Minimum input channels of a replaced convolution: image stems (1, 3 or 4 channels) keep theirs."""


@dataclass(frozen=True, slots=True)
class Words:
    """Names of a replacement in reports."""

    what: str
    """`depthwise`, in a change."""
    kind: str
    """What the block is: `a depth-separable one`."""


def replace_convolutions(
    module: nn.Module, make: MakeBlock, words: Words, selection: LayerSelection, run: ModuleRun, *, fit: bool
) -> Outcome:
    """Replace every dense convolution whose block is smaller, in place.

    Args:
        module: changed in place.
        make: gives the block; called for every convolution that could be replaced.
        words: names of the block in reports.
        selection: the layers that globs allow.
        run: how the module is called, and its batches.
        fit: whether each block is fitted to give what the convolution gave, on the run's inputs where they are real.

    Returns:
        The convolutions that were replaced, and the others with the reason.

    Raises:
        TechniqueError: none was replaced.
    """
    found, skipped = _candidates(module, selection, run)
    blocks: dict[str, Block] = {}
    changed = []
    for path, conv in found.items():
        block = make(conv)
        before, after = (count_params(each)[0] for each in (conv, block))
        if after >= before:
            skipped.append(
                Skip(path=path, reason=f"{words.kind} would have {after:,} parameters, and it has {before:,}")
            )
            continue
        blocks[path] = block
        shape = " x ".join(map(str, conv.weight.shape))
        changed.append(Change(path=path, what=words.what, before=shape, after=f"{after:,} of {before:,} parameters"))
    if not blocks:
        raise _nothing_to_replace(words, skipped)
    dense = with_dense(module, blocks) if fit and run.real else None
    for path, block in blocks.items():
        put(module, path, block)
    if dense is not None:
        fit_blocks(module, dense, blocks, run)
    return Outcome(changed, skipped)


def _nothing_to_replace(words: Words, skipped: list[Skip]) -> TechniqueError:
    reasons = [f"{skip.path}: {skip.reason}" for skip in skipped[:3]]
    return TechniqueError(
        f"no convolution of this model can become {words.kind}",
        "; ".join(reasons) or "it has no convolution",
        "student narrow, which takes any channels, or fewer_layers or low_rank; or give a student of your own",
    )


# Which


def _candidates(module: nn.Module, selection: LayerSelection, run: ModuleRun) -> tuple[dict[str, Conv], list[Skip]]:
    found: dict[str, Conv] = {}
    skipped = []
    owners, called = owned_parameters(module), _called(module, run)
    for path, layer in module.named_modules():
        if not isinstance(layer, _ConvNd):
            continue
        reason = _why_not(path, layer, selection, owners)
        if not reason and layer not in called:
            reason = NOT_RUN
        if reason:
            skipped.append(Skip(path=path, reason=reason))
        else:
            found[path] = layer  # type: ignore[assignment]
    return found, skipped


def _why_not(path: str, layer: _ConvNd, selection: LayerSelection, owners: Mapping[int, list[tuple[int, str]]]) -> str:
    if not path:
        return "the model itself is this one layer"
    if not selection.includes(path):
        return "left as it is by targets or ignore"
    if layer.transposed or not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return f"{type(layer).__name__} has no such block here; Conv1d and Conv2d have"
    if layer.groups > 1:
        return f"already grouped ({layer.groups} groups)"
    if prod(layer.kernel_size) == 1:
        return "kernel of size 1: no spatial part to separate"
    if layer.padding_mode != "zeros":
        return f"its padding_mode is {layer.padding_mode}, and the blocks pad with zeros"
    if layer.in_channels < FEWEST_INPUTS and not selection.targets:
        return f"it reads {layer.in_channels} channels, and a kernel for each is too little; targets can name it"
    if "weight" not in layer._parameters:
        return "its weight is computed from others (a parametrization)"
    if "forward" in vars(layer) or type(layer).forward not in (nn.Conv1d.forward, nn.Conv2d.forward):
        return f"{type(layer).__name__} has a forward of its own"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "hooks are attached to it, which a block in its place would not have"
    for name, tensor in layer._parameters.items():
        if tensor is not None and not tensor.requires_grad:
            return f"{name} is frozen (requires_grad is False)"
        if len({owner for owner, _ in owners.get(id(tensor), [])}) > 1:
            return f"{name} is shared with another layer"
    return ""


def _called(module: nn.Module, run: ModuleRun) -> set[nn.Module]:
    seen: set[nn.Module] = set()
    convs = [layer for layer in module.modules() if isinstance(layer, _ConvNd)]
    hooks = [layer.register_forward_pre_hook(lambda layer, _args: seen.add(layer)) for layer in convs]
    try:
        Probe.of(run).outputs(module)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
