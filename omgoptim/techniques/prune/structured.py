"""Remove whole channels, attention heads and hidden units.

What it does: groups dependent channels across layers (a dependency graph; heads by running the model), ranks them by
importance, removes the least important from every layer that writes, passes on or reads them, and fits the layers that
read them to their former outputs, by ridge regression on the model's own inputs without labels.
Use when: a model has to get smaller and faster on every engine. Without training about a third of the channels can be
removed; beyond that, a few epochs recover most of the quality. importance taylor and hessian need data, labels where
the loss does.
What you really get: storage, memory and operations fall together, by more than the ratio: half of the channels is about
a quarter of a convolution's weights. Time falls by less, in steps of the kernel's tile size.
`reconstruct` False leaves the layers as they are, and so do random inputs.
Limits: streams under LayerNorm, recurrent layers, torch.nn.MultiheadAttention, tied and frozen weights, and what a
model's code reshapes to fixed sizes are not pruned, each listed with the reason; at least one unit of every group
stays.
Source: DepGraph (arXiv:2301.12900) through torch-pruning, isomorphic ranking arXiv:2407.04616, re-fitting ThiNet
(arXiv:1707.06342); differs in that every group is proven by running the model before and after, and undone if it fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from omgoptim.errors import DataError, TechniqueError
from omgoptim.requests.prune import Structured
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.prune._channels.channel_allocation import (
    MacsPrediction,
    Widths,
    counted_macs,
    most_important,
    original_widths,
    round_widths,
    target_widths,
    widths_for_macs,
)
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.groups import Groups
from omgoptim.techniques.prune._channels.importance import importance_of
from omgoptim.techniques.prune._channels.removal import SIZES_FIX, remove, remove_with_positions
from omgoptim.techniques.prune._reconstruction import reconstruct_channels
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique

CORRECTIONS = 5
"""Maximum corrections when predicted and counted MACs disagree; each scales the target. Chosen: a safeguard."""


@module_technique(Structured, needs_data=False, source="arXiv:2301.12900")
def apply(module: nn.Module, params: Structured, run: ModuleRun) -> Outcome:
    """Remove channels until the ratio, of the original widths, or the target of MACs is reached.

    A target latency is the caller's task: it chooses the widths with `find_groups`, `importance_of` and a latency
    table, and calls `keep_only`; here such params count as the default ratio.

    Raises:
        SetupError: torch-pruning is not installed.
        DataError: importance taylor or hessian on random inputs.
        TechniqueError: nothing can be removed, or the target cannot be reached.
    """
    if params.importance in ("taylor", "hessian") and not run.real:
        raise DataError(
            f"importance {params.importance} needs data",
            "it uses gradients of the loss, and without data there are only random inputs",
            "give data, or use importance magnitude",
        )
    groups = find_groups(module, params, run)
    if not groups.groups:
        raise nothing_to_remove(groups)
    scores = importance_of(module, groups, params, run)
    full = original_widths(groups, module, run.original)

    def widths_at(ratio: float, round_to: int | None) -> Widths:
        targets = target_widths(module, groups, scores, full, params, ratio)
        return round_widths(groups, targets, full, params.max_layer_ratio, round_to)

    if params.target_macs_ratio is None:
        keep = most_important(groups, scores, widths_at(params.goal, params.round_to))
    else:
        prediction = MacsPrediction(module, groups, Probe.of(run))

        def keep_for(macs: float) -> dict[str, Tensor]:
            return most_important(
                groups, scores, widths_for_macs(groups, scores, prediction, macs, widths_at, params.round_to)
            )

        keep = _meet_macs_target(
            counted_macs(run.original, Probe.of(run))[0] / params.target_macs_ratio, keep_for, module, groups, run
        )
    if not keep:
        raise _nothing_removed(groups, params)
    return keep_only(module, groups, keep, params, run)


def keep_only(
    module: nn.Module, groups: Groups, keep: Mapping[str, Tensor], params: Structured, run: ModuleRun
) -> Outcome:
    """Remove all channels but those to keep, and fit what reads them where the params and the data allow it.

    Args:
        module: changed in place.
        groups: as `find_groups` found them in this module, which is changed.
        keep: name of a group to the root's channels (k,) that stay; a group that is not named stays whole.
        params: whether and how to reconstruct.
        run: how the module is called, and its batches.

    Raises:
        TechniqueError: nothing could be removed.
    """
    before = copy.deepcopy(module)
    outcome, remaining = remove_with_positions(module, groups, keep, run)
    if not (params.reconstruct and run.real):
        return outcome
    fitted = reconstruct_channels(module, before, remaining, run)
    layers = "1 layer with pruned inputs was" if len(fitted) == 1 else f"{len(fitted)} layers with pruned inputs were"
    note = f"{layers} fitted by least squares to the unpruned outputs; no labels were used."
    return replace(outcome, notes=[*outcome.notes, note]) if fitted else outcome


def _meet_macs_target(
    goal: float, keep_for: Callable[[float], dict[str, Tensor]], module: nn.Module, groups: Groups, run: ModuleRun
) -> dict[str, Tensor]:
    """Return the channels to keep so that the smaller module has at most `goal` counted MACs.

    `keep_for` predicts the channels for a number of MACs; the prediction is corrected by the count.
    """
    predicted = goal
    for _ in range(CORRECTIONS):
        keep = keep_for(predicted)
        if not keep:
            return keep
        smaller = copy.deepcopy(module)
        remove(smaller, groups, keep, run)
        counted = counted_macs(smaller, Probe.of(run))[0]
        if counted <= goal:
            return keep
        predicted *= goal / counted
    raise TechniqueError(
        f"the target of {goal:,.0f} MACs was not reached",
        f"{counted:,} MACs remain: pruning some groups had to be undone",
        "raise target_macs_ratio, or give a pruning_ratio instead",
    )


def nothing_to_remove(groups: Groups) -> TechniqueError:
    """Return the error for a model in which no group can shrink, with the most useful of the reasons."""
    rank = {"forward_fails": 0, "model_output": 2}
    ranked = sorted(groups.skipped, key=lambda skip: rank.get(skip.kind, 1))
    why = f"{ranked[0].path or 'the model'}: {ranked[0].reason}" if ranked else "it has no convolution or Linear"
    fails = any(skip.kind == "forward_fails" for skip in ranked)
    fix = SIZES_FIX if fails else "use method magnitude, which prunes single weights"
    return TechniqueError("no channel or head of this model can be removed", why, fix)


def _nothing_removed(groups: Groups, params: Structured) -> TechniqueError:
    widest = max(groups.groups, key=lambda group: group.width)
    step = widest.step(params.round_to)
    return TechniqueError(
        "the target would remove no channel",
        f"the widest group, {widest.name}, has {widest.width} channels, removable only in steps of {step}",
        "raise the pruning ratio, or lower round_to",
    )
