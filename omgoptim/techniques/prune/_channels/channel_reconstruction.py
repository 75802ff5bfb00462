"""Ridge regression of layers that lost input channels, to their outputs before the removal.

The remaining inputs compensate for the removed ones, and for all changes in earlier layers. The damping pulls towards
the former weights, so that directions without samples stay as they are.

Source: ThiNet (arXiv:1707.06342) and channel pruning (arXiv:1707.06168); differs in the target, which is the model
before, and in that the inputs are those of the smaller model with all earlier layers fitted already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from omgoptim.techniques.prune._channels.layer_widths import is_depthwise, width_of
from omgoptim.techniques.reconstruction.ridge import ridge
from omgoptim.techniques.reconstruction.sequential import LayerFit, fit_in_order
from omgoptim.techniques.registry import ModuleRun

RIDGE = 0.1
"""Damping. Digits example, half of the channels, 64 samples, no training: relative output error 0.20 at 0.001, 0.19 at
0.01, 0.20 at 0.1 and 0.30 at 1; the largest value that does not hurt holds the weights best where samples are few.
"""
MOST_FEATURES = 8192
"""Maximum inputs of a fitted layer: its second moments take half a gigabyte."""

FEWEST_ROWS, ROWS_PER_FEATURE = 10_000, 10
"""Rows of a fit: at least the first number, the second times the features; drawn at random from more."""


def reconstruct_channels(
    module: nn.Module, before: nn.Module, left: Mapping[tuple[str, str], Tensor], run: ModuleRun
) -> list[str]:
    """Fit every layer of `module` that lost inputs to its outputs in `before`.

    Args:
        module: the smaller model; its weights are changed.
        before: the same model before the removal; not changed.
        left: side of a layer to the remaining positions of those that it had in `before`.
        run: how both are called, and the batches to fit on.

    Returns:
        Paths of the fitted layers, in the order in which they run.
    """
    lost = [
        path
        for (path, side), kept in left.items()
        if side == "in"
        and _can_be_fitted(layer := before.get_submodule(path))
        and len(kept) < (width_of(layer, "in") or 0)
    ]
    outputs = {path: left.get((path, "out")) for path in lost}
    return fit_in_order(module, before, outputs, run, LayerFit(_solve, FEWEST_ROWS, ROWS_PER_FEATURE))


def _solve(_layer: Any, gram: Tensor, cross: Tensor) -> Tensor:
    return ridge(gram, cross, RIDGE)


def _can_be_fitted(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features <= MOST_FEATURES
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or is_depthwise(layer) or layer.padding_mode != "zeros":
        return False
    return layer.weight[0].numel() <= MOST_FEATURES
