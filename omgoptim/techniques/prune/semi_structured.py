"""Keep n of every m neighbouring weights: the pattern that some GPUs run faster.

What it does: along each output's inputs, of every m neighbours leaves the n that score highest, by magnitude or by
magnitude times input norm, and zeroes the others. Neighbours are input features; in a convolution the input channels at
one position of the kernel. The pattern decides the sparsity: 2:4 is half, in every layer. With data, the remaining
weights are fitted as by magnitude.
Use when: the model will run on a GPU with sparse tensor cores, whose kernels take 2:4 in half precision or int8.
What you really get: storage: a zero takes a bit instead of a number in the artifact. Speed: none on the engines here;
torch's to_sparse_semi_structured, TensorRT and the like take the pattern, and the layer's sizes have to suit their
kernels too (multiples of 32 or 64 for torch's).
Limits: a layer whose input channels m does not divide stays, as do biases, normalization, embeddings that are not named
and frozen weights; recurrent layers stay where the score needs their inputs.
Source: NVIDIA's ASP (arXiv:2104.08378), without its permutation search and its retraining; Wanda's score for the
second, arXiv:2306.11695.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.reports import Skip
from omgoptim.requests.prune import SemiStructured
from omgoptim.techniques.prune._reconstruction import reconstructed
from omgoptim.techniques.prune._unstructured.masking import n_of_m_mask, nothing_zeroed, outcome_of, zero_where
from omgoptim.techniques.prune._unstructured.parameter_selection import (
    Selection,
    Weight,
    channels_in,
    from_rows,
    select,
    to_rows,
)
from omgoptim.techniques.prune._unstructured.saliency import input_norms, wanda
from omgoptim.techniques.prune.wanda import with_input_norms
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(SemiStructured, needs_data=False, source="arXiv:2104.08378")
def apply(module: nn.Module, params: SemiStructured, run: ModuleRun) -> Outcome:
    """Zero m - n of every m neighbours in every selected layer whose inputs m divides.

    Raises:
        TechniqueError: no layer is selected, m divides no layer's inputs, or nothing became zero.
    """
    n, m = params.kept
    untouched = copy.deepcopy(module)
    selection = _divisible(select(module, params.targets, params.ignore), m)
    norms: dict[str, Tensor] = {}
    if params.score == "wanda":
        norms = input_norms(module, selection.weights, run)
        selection = with_input_norms(selection, norms)
    before = [int((weight.parameter == 0).sum()) for weight in selection.weights]
    for weight in selection.weights:
        rows = to_rows(weight.parameter.detach(), weight.layer)
        scores = wanda(rows, norms[weight.path]) if norms else rows.abs()
        mask = n_of_m_mask(scores, rows, n, m)
        zero_where(weight, from_rows(mask, weight.layer, tuple(weight.parameter.shape)))
    if selection.zeros <= sum(before):
        raise nothing_zeroed(selection, (m - n) / m)
    outcome = outcome_of(selection, before, f"{params.pattern} by {params.score}", set())
    return reconstructed(outcome, module, untouched, params, run)


def _divisible(selection: Selection, m: int) -> Selection:
    """Return the weights whose runs of input channels m divides; the others are skipped with their sizes."""
    fitting: list[Weight] = []
    skipped: list[Skip] = []
    sizes: list[str] = []
    for weight in selection.weights:
        inputs = channels_in(weight.layer, tuple(weight.parameter.shape))
        if inputs % m == 0:
            fitting.append(weight)
        else:
            sizes.append(f"{weight.path}: {inputs}")
            skipped.append(
                Skip(path=weight.path, reason=f"its {inputs} inputs are not divisible by {m}", kind="unsupported")
            )
    if not fitting:
        raise TechniqueError(
            f"no layer has a number of inputs divisible by {m}",
            f"their numbers of inputs: {', '.join(sizes[:10])}",
            "use an N:M pattern whose M divides them, or method magnitude",
        )
    return Selection(fitting, [*selection.skipped, *skipped])
