"""Zero the weights of smallest magnitude.

What it does: ranks the selected weights by |w|, and zeroes the lowest. scope global ranks all layers together and
per_layer each alone. layer_ratios lamp ranks all together by |w|^2 over the sum of what is not smaller in its layer;
erdos_renyi allocates sparsity to each layer by its shape, and ranks within it; both ignore scope. With data, the
remaining weights are then fitted to the dense layer's outputs, without labels.
Use when: a file has to get smaller, or a sparse engine follows. Needs no data and takes seconds; with data much less is
lost, for some forward passes per layer. Batch normalization has to be estimated again afterwards.
What you really get: storage: a zero takes a bit instead of a number in the artifact. Memory: nothing, the tensors are
dense when opened. Speed: nothing on any engine here, which multiply zeros like any number.
Limits: biases, normalization, embeddings that are not named, and frozen weights stay. Layers that together hold less
than 1 % of the weights (a first layer of one channel, a classifier) stay dense unless targets are given.
Source: arXiv:1506.02626, without its retraining; LAMP arXiv:2010.07611; Erdos-Renyi kernel arXiv:1911.11134.
"""

from __future__ import annotations

from torch import nn

from omgoptim.requests.prune import Magnitude
from omgoptim.techniques.prune._reconstruction import zero_and_reconstruct
from omgoptim.techniques.prune._unstructured.masking import Scope, SparsityTarget
from omgoptim.techniques.prune._unstructured.parameter_selection import select
from omgoptim.techniques.prune._unstructured.saliency import lamp
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(Magnitude, needs_data=False, source="arXiv:1506.02626")
def apply(module: nn.Module, params: Magnitude, run: ModuleRun) -> Outcome:
    """Zero weights until `params.sparsity` of the selected ones are zero.

    Raises:
        TechniqueError: no layer is selected, or nothing became zero.
    """
    selection = select(module, params.targets, params.ignore)
    by_lamp = params.layer_ratios == "lamp"
    scores = {
        weight.path: lamp(weight.parameter) if by_lamp else weight.parameter.detach().abs()
        for weight in selection.weights
    }
    scope: Scope = "global" if by_lamp else params.scope
    if params.layer_ratios == "erdos_renyi":
        scope = "erdos_renyi"
    score = "LAMP score" if by_lamp else "magnitude"
    target = SparsityTarget(
        params.sparsity, scope, f"{score}, {scope.replace('_', ' ')}", spare_small=not params.targets
    )
    return zero_and_reconstruct(module, selection, scores, target, params, run)
