"""Ridge regression of the nonzero weights, to the layers' outputs in the dense model.

Each output's kept weights D get min |U D' - R|^2 + l |D|^2, U being the inputs in the sparse model and R the difference
of the outputs; D is zero where the weight is. Source: the reconstruction of layer-wise pruning (OBC arXiv:2208.11580,
SparseGPT arXiv:2301.00774) with a given mask; differs in solving all rows at once by conjugate gradients, and in that
the inputs are those of the sparse model, so that errors do not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.requests.prune import SemiStructured, Unstructured
from omgoptim.techniques.reconstruction.ridge import masked_ridge
from omgoptim.techniques.reconstruction.sequential import LayerFit, fit_in_order, fits_bias
from omgoptim.techniques.registry import ModuleRun, Outcome

RIDGE = 1e-2
"""Damping. Digits example, 90 % sparsity, 64 samples: relative output error 0.417 up to this value, 0.423 at 0.1."""
MOST_FEATURES = 8192
"""Maximum inputs of a fitted layer: its second moments take half a gigabyte."""

FEWEST_ROWS, ROWS_PER_FEATURE = 20_000, 30
"""Rows of a fit: at least the first number, the second times the features; drawn at random from more."""


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
    layers = "1 layer" if len(fitted) == 1 else f"{len(fitted)} layers"
    note = f"The remaining weights of {layers} were fitted to the outputs of the dense model, without labels."
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
    outputs = dict.fromkeys((path for path in paths if _can_be_fitted(module, path)), None)
    return fit_in_order(module, before, outputs, run, LayerFit(_solve, FEWEST_ROWS, ROWS_PER_FEATURE))


def _solve(layer: Any, gram: Tensor, cross: Tensor) -> Tensor:
    groups, _, outputs = cross.shape
    kept = (layer.weight.detach() != 0).reshape(groups, outputs, -1).to(gram)
    if fits_bias(layer):
        kept = torch.cat([kept, kept.new_ones(groups, outputs, 1)], 2)
    return masked_ridge(gram, cross, kept.mT, RIDGE)


def _can_be_fitted(module: nn.Module, path: str) -> bool:
    layer = dict(module.named_modules()).get(path)
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or layer.weight[0].numel() > MOST_FEATURES:
        return False
    owners = [other for other in module.modules() if any(w is layer.weight for w in other.parameters(recurse=False))]
    return len(owners) == 1
