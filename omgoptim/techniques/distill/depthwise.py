"""Replace the teacher's convolutions by depthwise-separable ones.

What it does: every dense k x k convolution (in -> out) becomes one kernel for each input channel and a 1x1 mix, in * (k
k + out) weights instead of in * out * k k. The kernels are the nearest to the teacher's weights (the first singular
vector of each input channel's part); the mix is fitted to what the convolution gave, by ridge regression on training
inputs without labels. The teacher's normalization and activation stay behind it; there is no activation between the two
parts.
Use when: a convolutional teacher; 3x3 convolutions of many channels get 8 to 9 times smaller. With `width` and `depth`
below 1 the teacher is first cut to those. Training is needed: the untrained student computes little of the teacher's
function.
What you really get: storage and MACs in proportion to the parameters. Time falls by less: depthwise kernels wait for
memory, on a CPU often no faster than the dense ones they replace where channels are few. Memory for activations grows.
Limits: 1x1, grouped and transposed convolutions, those of fewer than 5 input channels (stems), frozen and shared ones
stay, and where the block would not be smaller. `targets` can name a stem.
Source: arXiv:1704.04861 (MobileNets), without an activation in between after arXiv:1610.02357 (Xception); differs in
the start from the teacher's weights and outputs.
"""

from __future__ import annotations

from torch import nn

from omgoptim.blocks.depth_separable import DepthSeparableConv
from omgoptim.requests.distill import Depthwise
from omgoptim.techniques.distill._student.block_replacement import BlockNames, replace_convolutions
from omgoptim.techniques.distill._student.derivation import derive
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique

WORDS = BlockNames("depthwise", "a depthwise-separable convolution")


@module_technique(Depthwise, needs_data=False, source="arXiv:1704.04861")
def apply(module: nn.Module, params: Depthwise, run: ModuleRun) -> Outcome:
    """Replace convolutions of `module`, a copy of the teacher, in place.

    Raises:
        SetupError: a width below 1, and torch-pruning is not installed.
        TechniqueError: no convolution can be replaced, or what is left does not run.
    """
    return derive(module, params, run, replace)


def replace(module: nn.Module, selection: LayerSelection, run: ModuleRun, fit: bool) -> Outcome:
    """Replace dense convolutions by depthwise-separable ones."""
    return replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, selection, run, fit=fit)
