"""Factorize the teacher's large weights into two low-rank factors.

What it does: every Linear (and convolution) that gets smaller by it keeps `rank_ratio` of its parameters, as factorize
does: with the least output error where there is data (whitened), else the least weight error (svd).
Use when: transformers and networks with large Linear layers; it keeps every layer and every width, so it is the
mildest student. With `width` and `depth` below 1 the teacher is first cut to those.
What you really get: storage and memory by the parameters; time on every engine where ranks are well below half of the
layer's width, since two narrow matrix products take longer than one with as many MACs.
Limits: attention's packed projections, embeddings, recurrent layers, shared weights and depthwise convolutions stay.
`initialize` random keeps the shape of the plain SVD and forgets its weights.
Source: arXiv:2403.07378 (SVD-LLM), as factorize has it; here the factors are a start, and distillation trains them.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.requests.distill import LowRank
from omgoptim.requests.factorize import Svd, Whitened
from omgoptim.techniques.distill._student.derivation import derive
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.factorize._low_rank.factorization import factorize
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(LowRank, needs_data=False, source="arXiv:2403.07378")
def apply(module: nn.Module, params: LowRank, run: ModuleRun) -> Outcome:
    """Factorize layers of `module`, a copy of the teacher, in place.

    Raises:
        SetupError: a width below 1, and torch-pruning is not installed.
        TechniqueError: no layer can be factorized, or what is left does not run.
    """
    return derive(module, params, run, partial(replace, params.rank_ratio))


def replace(rank_ratio: float, module: nn.Module, selection: LayerSelection, run: ModuleRun, fit: bool) -> Outcome:
    """Replace large weights by two low-rank factors.

    Raises:
        TechniqueError: no layer can be factorized.
    """
    targets = []
    if selection.targets or selection.ignore:
        layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        free = [path for path, layer in layers if layer.weight.requires_grad or selection.targets]
        targets = [path for path in free if selection.includes(path)]
        if not targets:
            raise TechniqueError("no layer can be factorized", "targets and ignore select no Linear layer or Conv2d")
    if fit and run.real:
        whitened = Whitened(rank_ratio=rank_ratio, targets=targets)
        return factorize(module, whitened, run, samples=whitened.calibration_samples)
    return factorize(module, Svd(rank_ratio=rank_ratio, targets=targets), run, samples=None)
