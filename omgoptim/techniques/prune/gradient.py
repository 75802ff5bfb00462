"""Zero the weights whose removal would change the loss least.

What it does: runs the model forward and backward on training batches. sensitivity scores a weight by |w g|, g being the
mean gradient of the loss over the batches: how much the loss changes, to first order, when the weight is removed.
movement takes small SGD steps, sums -w g over them and then restores the weights: those that move towards zero are
pruned first. The remaining weights are fitted as by magnitude.
Use when: labels are at hand and the loss says more than magnitudes do. A trained model's gradients are small, so give
many batches; movement means little over the few steps taken here. Costs a backward pass for each batch.
What you really get: storage: a zero takes a bit instead of a number in the artifact. Memory and speed: nothing.
Limits: weights that no gradient reaches, and what magnitude leaves alone, stay. Without labels the loss is one of the
outputs' size. At high sparsity of a model that fits its training data well, gradients are mostly noise, and magnitude
loses far less.
Source: SNIP (arXiv:1810.02340), on a trained model instead of a fresh one; movement pruning (arXiv:2005.07683), over
one pass instead of a whole training. The model is in eval mode: no dropout, batch normalization with its statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.requests.prune import Gradient
from omgoptim.techniques.prune._reconstruction import zero_and_reconstruct
from omgoptim.techniques.prune._unstructured.masking import SparsityTarget
from omgoptim.techniques.prune._unstructured.parameter_selection import Weight, select
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique

STEP = 0.01
"""Learning rate of movement's steps, after which weights are restored. Chosen: SGD's rate in training/config.py."""

NO_GRADIENT = "the loss has no gradient with respect to it"


@module_technique(Gradient, needs_data=True, source="arXiv:1810.02340")
def apply(module: nn.Module, params: Gradient, run: ModuleRun) -> Outcome:
    """Zero weights until `params.sparsity` of the selected ones are zero.

    Raises:
        TechniqueError: no layer is selected, no gradient reaches one, a loss is not a number, or nothing became zero.
    """
    selection = select(module, params.targets, params.ignore)
    compute_saliency = _sensitivity if params.score == "sensitivity" else _movement
    scores = compute_saliency(module, selection.weights, run)
    if not scores:
        raise TechniqueError(
            "the loss has no gradient with respect to the selected weights",
            "the loss does not depend on them, or forward detaches them from the graph",
            "use method magnitude or wanda",
        )
    target = SparsityTarget(
        params.sparsity, params.scope, f"{params.score}, {params.scope.replace('_', ' ')}", not params.targets
    )
    return zero_and_reconstruct(module, selection.only(scores, NO_GRADIENT), scores, target, params, run)


def _sensitivity(module: nn.Module, weights: list[Weight], run: ModuleRun) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for gradients in _gradients(module, weights, run):
        for path, gradient in gradients.items():
            sums[path] = sums[path] + gradient if path in sums else gradient
    return {w.path: (w.parameter.detach() * sums[w.path]).abs() for w in weights if w.path in sums}


def _movement(module: nn.Module, weights: list[Weight], run: ModuleRun) -> dict[str, Tensor]:
    moved: dict[str, Tensor] = {}
    with _restored(weights):
        for gradients in _gradients(module, weights, run):
            for weight in weights:
                gradient = gradients.get(weight.path)
                if gradient is None:
                    continue
                step = -weight.parameter.detach() * gradient
                moved[weight.path] = moved[weight.path] + step if weight.path in moved else step
                with torch.no_grad():
                    weight.parameter.sub_(STEP * gradient)
    return moved


def _gradients(module: nn.Module, weights: list[Weight], run: ModuleRun) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of each batch's loss, by path, at the current weights."""
    parameters = [weight.parameter for weight in weights]
    total = max(len(run.statistics.batches), 1)
    for done, (args, kwargs, target) in enumerate(run.calls()):
        on_a_gpu = parameters[0].device.type == "cuda"  # whose recurrent kernels go backward in train mode only
        with evaluation_mode(module), torch.enable_grad(), torch.backends.cudnn.flags(enabled=not on_a_gpu):
            loss = run.loss(module(*args, **kwargs), target)
            if not bool(torch.isfinite(loss)):
                why = f"the loss is {loss:g} on batch {done + 1} of the training data"
                raise TechniqueError("the saliency cannot be computed", why)
            found = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
        run.progress("gradients", (done + 1) / total)
        with_gradient = ((w.path, g) for w, g in zip(weights, found, strict=False) if g is not None)
        yield {path: g.detach() for path, g in with_gradient if bool(g.any())}  # an expert without samples has zeros


@contextmanager
def _restored(weights: list[Weight]) -> Iterator[None]:
    """Restore the weights at the end of the block."""
    before = [weight.parameter.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in zip(weights, before, strict=True):
                weight.parameter.copy_(values)
