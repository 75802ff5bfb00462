"""Zero the weights whose magnitude times the norm of their input is smallest.

What it does: runs the model on training inputs, and scores a weight by |w_oi| ||x_i||, x_i being all that the weight is
multiplied with: an input feature, or what one position of a convolution's kernel visits in one channel. Zeroes the
lowest of each output's row (per_row), of each layer, or of all; the remaining weights are fitted as by magnitude.
Use when: inputs differ much in scale (transformers), at moderate sparsity, without training. Needs data, no labels.
What you really get: storage: a zero takes a bit instead of a number in the artifact. Memory and speed: nothing.
Limits: recurrent layers and embeddings, whose inputs are not seen from outside, and layers that are not called stay.
Per row all layers get the same sparsity; at high sparsity of a convolutional network magnitude, which lets layers
differ, loses less.
Source: Wanda (arXiv:2306.11695); differs in that convolutions are taken too, that each layer's norms are read from the
dense model, not after the layers before it were pruned, and in that fitting.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.requests.prune import Wanda
from omgoptim.techniques.prune._reconstruction import zero_and_reconstruct
from omgoptim.techniques.prune._unstructured.masking import SparsityTarget
from omgoptim.techniques.prune._unstructured.parameter_selection import Selection, from_rows, select, to_rows
from omgoptim.techniques.prune._unstructured.saliency import input_norms, wanda
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique

INPUTS_NOT_SEEN = (
    "no inputs of its weight were seen: it did not run, or another layer reads it; method magnitude can prune it"
)


@module_technique(Wanda, needs_data=True, source="arXiv:2306.11695")
def apply(module: nn.Module, params: Wanda, run: ModuleRun) -> Outcome:
    """Zero weights until `params.sparsity` of the selected ones are zero.

    Raises:
        TechniqueError: no layer is selected, no layer's inputs can be seen, or nothing became zero.
    """
    selection = select(module, params.targets, params.ignore)
    norms = input_norms(module, selection.weights, run)
    selected = with_input_norms(selection, norms)
    scores = {}
    for weight in selected.weights:
        rows = wanda(to_rows(weight.parameter.detach(), weight.layer), norms[weight.path])
        scores[weight.path] = from_rows(rows, weight.layer, tuple(weight.parameter.shape))
    score_name = f"magnitude x input norm, {params.scope.replace('_', ' ')}"
    target = SparsityTarget(params.sparsity, params.scope, score_name, spare_small=not params.targets)
    return zero_and_reconstruct(module, selected, scores, target, params, run)


def with_input_norms(selection: Selection, norms: Mapping[str, Tensor]) -> Selection:
    """Return the weights whose inputs were seen; the others are skipped.

    Raises:
        TechniqueError: none was.
    """
    if not any(weight.path in norms for weight in selection.weights):
        raise TechniqueError(
            "Wanda finds no layer inputs",
            "forward hooks do not see the inputs of these weights: "
            + ", ".join(weight.path for weight in selection.weights[:5]),
            "use method magnitude",
        )
    return selection.only(norms, INPUTS_NOT_SEEN)
