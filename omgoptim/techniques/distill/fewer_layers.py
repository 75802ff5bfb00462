"""Keep every n-th of the teacher's repeated layers, as DistilBERT does.

What it does: finds layers that repeat, of one class and shape, each giving the shape that it gets: children of a
ModuleList or Sequential, groups of neighbours (convolution, normalization, ReLU), or lists that the code runs side by
side. Of every such stack `keep_layers` stay, or the fraction `depth`, half by default: spread evenly, the first and the
last among them. With real inputs each is then fitted to what it and the ones after it gave, in closed form, without
labels (`layer_bridging`). Attributes that count the layers, in the model and its Hugging Face configuration, are
updated. With `width` below 1 the remaining layers are narrowed too.
Use when: transformers and other deep stacks. The embedding and the head stay as they are, so their parameters do too.
What you really get: time and operations fall with the layers, on every engine; storage by their parameters.
Limits: a model whose code hard-codes the number of layers (`range(12)`) does not run and is refused; layers inside one
recurrent module stay. With several stacks (an encoder and a decoder, stages) each keeps that many.
Source: arXiv:1910.01108 (DistilBERT); differs in that it works on any module that runs without some of its
layers, and fits those that stay.
"""

from __future__ import annotations

from torch import nn

from omgoptim.requests.distill import FewerLayers
from omgoptim.techniques.distill._student.derivation import derive
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(FewerLayers, needs_data=False, source="arXiv:1910.01108")
def apply(module: nn.Module, params: FewerLayers, run: ModuleRun) -> Outcome:
    """Remove layers of `module`, a copy of the teacher, in place.

    Raises:
        TechniqueError: no layer repeats, or what is left does not run.
    """
    return derive(module, params, run)
