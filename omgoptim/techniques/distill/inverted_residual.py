"""Replace the teacher's convolutions by MobileNetV2's inverted residual blocks.

What it does: every dense k x k convolution (in -> out) becomes 1x1 to `expansion` times in, a kernel for each of those
channels, and 1x1 to out, each with a batch normalization, ReLU6 after the first two. It is initialized close to the
convolution: the first 1x1 copies channels, the kernels are the leading singular vectors of each input channel's
weights, moved to where ReLU6 changes nothing, and the last 1x1 is fitted to what the convolution gave, by ridge
regression on training inputs without labels. The teacher's own normalization and activation stay behind the block.
Use when: a convolutional teacher, where depthwise alone loses too much: it has `expansion` times its weights, and two
non-linear steps more. With `width` and `depth` below 1 the teacher is first cut to those. Training is needed.
What you really get: storage and MACs in proportion to the parameters; time falls by less, as a block is three layers
where one was, and its normalizations only go into them when it is exported.
Limits: 1x1, grouped and transposed convolutions, those of fewer than 5 input channels (stems), frozen and shared ones
stay, and where the block would not be smaller: at expansion 6 a 3x3 convolution of equal channels never gets smaller.
Source: arXiv:1801.04381 (MobileNetV2); differs in a smaller expansion by default, in adding no input (the shortcuts are
the teacher's), and in the initialization: on 2,000 digits of MNIST, 7,900 parameters reach 91 % after three epochs, and
42 % from random weights.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from omgoptim.blocks.inverted_residual import InvertedResidual as Block
from omgoptim.requests.distill import InvertedResidual
from omgoptim.techniques.distill._student.block_replacement import BlockNames, Conv, replace_convolutions
from omgoptim.techniques.distill._student.derivation import derive
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique

WORDS = BlockNames("inverted residual", "an inverted residual block")


@module_technique(InvertedResidual, needs_data=False, source="arXiv:1801.04381")
def apply(module: nn.Module, params: InvertedResidual, run: ModuleRun) -> Outcome:
    """Replace convolutions of `module`, a copy of the teacher, in place.

    Raises:
        SetupError: a width below 1, and torch-pruning is not installed.
        TechniqueError: no convolution can be replaced, or what is left does not run.
    """
    return derive(module, params, run, partial(replace, params.expansion))


def replace(expansion: float, module: nn.Module, selection: LayerSelection, run: ModuleRun, fit: bool) -> Outcome:
    """Replace dense convolutions by inverted residual blocks."""

    def make(conv: Conv) -> Block:
        return Block.from_conv(conv, expansion)

    return replace_convolutions(module, make, WORDS, selection, run, fit=fit)
