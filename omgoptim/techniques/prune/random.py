"""Zero weights drawn at random: the baseline for every other method.

What it does: gives each selected weight a random score, and zeroes the lowest; the same seed gives the same zeros, and
a higher sparsity adds to them. Sparsity is allocated to layers, and the remaining weights are fitted, as by magnitude.
Use when: a baseline is needed for a method's gain at the same sparsity. Needs no data.
What you really get: storage: a zero takes a bit instead of a number in the artifact. Memory and speed: nothing.
Limits: as magnitude: biases, normalization, unnamed embeddings, frozen weights and the smallest layers stay.
Source: the control in Gale et al. (arXiv:1902.09574); Erdos-Renyi kernel arXiv:1911.11134.
"""

from __future__ import annotations

import torch
from torch import nn

from omgoptim.requests.prune import Random
from omgoptim.techniques.prune._reconstruction import zero_and_reconstruct
from omgoptim.techniques.prune._unstructured.masking import Scope, SparsityTarget
from omgoptim.techniques.prune._unstructured.parameter_selection import select
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(Random, needs_data=False, source="arXiv:1902.09574")
def apply(module: nn.Module, params: Random, run: ModuleRun) -> Outcome:
    """Zero weights at random until `params.sparsity` of the selected ones are zero.

    Raises:
        TechniqueError: no layer is selected, or nothing became zero.
    """
    selection = select(module, params.targets, params.ignore)
    generator = torch.Generator().manual_seed(run.seed)
    scores = {weight.path: torch.rand(weight.parameter.shape, generator=generator) for weight in selection.weights}
    scope: Scope = "erdos_renyi" if params.layer_ratios == "erdos_renyi" else params.scope
    target = SparsityTarget(
        params.sparsity, scope, f"at random, {scope.replace('_', ' ')}", spare_small=not params.targets
    )
    return zero_and_reconstruct(module, selection, scores, target, params, run)
