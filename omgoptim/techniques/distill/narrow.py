"""Remove the teacher's least important channels, heads and hidden units; distillation follows.

What it does: keeps `width` of the channels of every group of dependent channels, of attention heads and of the hidden
units of LSTM, GRU and RNN layers, those with the largest weights, at least one each; with `depth` below 1 every n-th of
the layers that repeat as well. Layers that lost inputs are fitted to their outputs in the teacher, by ridge regression
on training inputs without labels.
Use when: the first choice for convolutional and recurrent teachers. Parameters fall with about the square of the width:
a quarter of the channels is a sixteenth of a convolution. Deriving it takes seconds; training does the rest.
What you really get: storage, memory and operations fall together; time on every engine too, in steps of the kernel's
tile size (from 64 channels on, widths are multiples of 8).
Limits: streams under LayerNorm stay as wide as they are, so a transformer loses heads and hidden units only; a
recurrent layer whose units a normalization mixes, and the Linear layers behind a bidirectional one, stay. Each is
listed with the reason. `initialize` random keeps the shape with random weights: a worse start, for ablations.
Source: pruning as the start of a student, arXiv:2407.14679 (Minitron) and arXiv:2301.12900 (DepGraph); differs in
magnitudes instead of activations for importance, and in fitting what reads the channels in closed form.
"""

from __future__ import annotations

from torch import nn

from omgoptim.requests.distill import Narrow
from omgoptim.techniques.distill._student.derivation import derive
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(Narrow, needs_data=False, source="arXiv:2407.14679")
def apply(module: nn.Module, params: Narrow, run: ModuleRun) -> Outcome:
    """Narrow `module`, a copy of the teacher, in place.

    Raises:
        SetupError: torch-pruning is not installed.
        TechniqueError: nothing of it can be narrowed, or what is left does not run.
    """
    return derive(module, params, run)
