"""Ridge regression after pruning: of layers that lost input channels, and of the nonzero weights of masked layers.

The changes D of the remaining weights compensate for the removed ones and for all changes in earlier layers: they get
min |U D' - R|^2 + l |D|^2, U being the inputs in the pruned model and R the difference of the outputs to those before.
The damping l pulls towards the former weights, so that directions without samples stay as they are.

Sources: ThiNet (arXiv:1707.06342), channel pruning (arXiv:1707.06168); for a given mask OBC (arXiv:2208.11580) and
SparseGPT (arXiv:2301.00774), here for all rows at once by conjugate gradients. Differs in that the inputs are those of
the pruned model with all earlier layers fitted already, so that errors do not add up.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.requests.prune import SemiStructured, Unstructured
from omgoptim.techniques.prune._channels.groups import is_depthwise, width_of
from omgoptim.techniques.prune._unstructured.masking import SparsityTarget, zero_lowest
from omgoptim.techniques.prune._unstructured.parameter_selection import Selection
from omgoptim.techniques.reconstruction.least_squares import masked_ridge, ridge
from omgoptim.techniques.reconstruction.sequential import LayerFit, fit_in_order, fits_bias
from omgoptim.techniques.registry import ModuleRun, Outcome
from omgoptim.text import plural

CHANNEL_DAMPING = 0.1
"""Digits example, half of the channels, 64 samples, no training: relative output error 0.20 at 0.001, 0.19 at 0.01,
0.20 at 0.1 and 0.30 at 1; the largest value that does not hurt holds the weights best where samples are few.
"""

MASKED_DAMPING = 1e-2
"""Digits example, 90 % sparsity, 64 samples: relative output error 0.417 up to this value, 0.423 at 0.1."""

MAX_FEATURES = 8192
"""Maximum inputs of a fitted layer. Chosen by memory: its second moments take half a gigabyte."""


def reconstruct_channels(
    module: nn.Module, before: nn.Module, remaining: Mapping[tuple[str, str], Tensor], run: ModuleRun
) -> list[str]:
    """Fit every layer of `module` that lost inputs to its outputs in `before`.

    Args:
        module: the smaller model; its weights are changed.
        before: the same model before the removal; not changed.
        remaining: side of a layer to the remaining positions of those that it had in `before`.
        run: how both are called, and the batches to fit on.

    Returns:
        Paths of the fitted layers, in the order in which they run.
    """
    lost = [
        path
        for (path, side), kept in remaining.items()
        if side == "in"
        and _can_be_fitted(layer := before.get_submodule(path))
        and len(kept) < (width_of(layer, "in") or 0)
    ]
    outputs = {path: remaining.get((path, "out")) for path in lost}
    fit = LayerFit(
        lambda _layer, gram, cross: ridge(gram, cross, CHANNEL_DAMPING), min_rows=10_000, rows_per_feature=10
    )
    return fit_in_order(module, before, outputs, run, fit)


def _can_be_fitted(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features <= MAX_FEATURES
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or is_depthwise(layer) or layer.padding_mode != "zeros":
        return False
    return layer.weight[0].numel() <= MAX_FEATURES


def zero_and_reconstruct(
    module: nn.Module,
    selection: Selection,
    scores: Mapping[str, Tensor],
    target: SparsityTarget,
    params: Unstructured,
    run: ModuleRun,
) -> Outcome:
    """Zero the weights with the lowest scores, and fit the remaining ones where there is real data; in place.

    Raises:
        TechniqueError: no weight became zero.
    """
    before = copy.deepcopy(module)
    return reconstructed(zero_lowest(selection, scores, target), module, before, params, run)


def reconstructed(
    outcome: Outcome, module: nn.Module, before: nn.Module, params: Unstructured | SemiStructured, run: ModuleRun
) -> Outcome:
    """Fit the nonzero weights where there is real data, and return the outcome with a note on it.

    Args:
        outcome: of the masking.
        module: after masking; changed.
        before: a copy from before it; not changed.
        params: of the technique; `reconstruct` False leaves the weights as they are.
        run: how the module is called, and its batches.
    """
    if not run.real or not params.reconstruct:
        return outcome
    fitted = reconstruct_kept_weights(module, before, [change.path for change in outcome.changed], run)
    if not fitted:
        return outcome
    layers = plural(len(fitted), "layer")
    note = f"The remaining weights of {layers} were fitted by least squares to the dense outputs; no labels were used."
    return replace(outcome, notes=[*outcome.notes, note])


def reconstruct_kept_weights(module: nn.Module, before: nn.Module, paths: Sequence[str], run: ModuleRun) -> list[str]:
    """Fit the nonzero weights of linear layers and of convolutions of one and two dimensions.

    Args:
        module: after masking; its kept weights and biases are changed, and no zero.
        before: the same module before; not changed.
        paths: of the masked layers.
        run: how the module is called, and the batches to fit on.

    Returns:
        Paths of the fitted layers, in the order in which they run. Left out are those that run more than once or not at
        all, or share their weight.
    """
    outputs = dict.fromkeys((path for path in paths if _can_be_fitted_masked(module, path)), None)
    return fit_in_order(module, before, outputs, run, LayerFit(_solve_masked, min_rows=20_000, rows_per_feature=30))


def _solve_masked(layer: Any, gram: Tensor, cross: Tensor) -> Tensor:
    groups, _, outputs = cross.shape
    kept = (layer.weight.detach() != 0).reshape(groups, outputs, -1).to(gram)
    if fits_bias(layer):
        kept = torch.cat([kept, kept.new_ones(groups, outputs, 1)], 2)
    return masked_ridge(gram, cross, kept.mT, MASKED_DAMPING)


def _can_be_fitted_masked(module: nn.Module, path: str) -> bool:
    layer = dict(module.named_modules()).get(path)
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or layer.weight[0].numel() > MAX_FEATURES:
        return False
    owners = [other for other in module.modules() if any(w is layer.weight for w in other.parameters(recurse=False))]
    return len(owners) == 1
