"""Builder of students of one teacher, with cached analyses."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import Auto, Depthwise, Derived, FewerLayers, InvertedResidual, LowRank
from omgoptim.techniques.distill import depthwise, inverted_residual, low_rank
from omgoptim.techniques.distill._student.block_replacement import FEWEST_INPUTS
from omgoptim.techniques.distill._student.compatibility import output_shapes
from omgoptim.techniques.distill._student.derivation import (
    Replace,
    Shortened,
    bridged,
    finish,
    joined,
    keeping,
    narrow,
    shorten,
    stays,
)
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.distill._student.narrowing import Narrowing, find_narrowing
from omgoptim.techniques.distill._student.repeated_layers import find_stacks
from omgoptim.techniques.registry import ModuleRun, Outcome


@dataclass(slots=True)
class _Base:
    """The teacher with some of its layers, and its narrowable groups once they were computed."""

    module: nn.Module
    short: Shortened
    narrowing: Narrowing | None = None


class StudentBuilder:
    """Builder of students of one teacher, which is not changed."""

    def __init__(self, teacher: nn.Module, auto: Auto, run: ModuleRun) -> None:
        self.teacher = teacher
        self.params = count_params(teacher)[0]
        self._run = run
        self._chosen = LayerSelection.of(teacher, auto)
        self._shapes = output_shapes(teacher, run)
        self.stacks = find_stacks(teacher, self._chosen, run)
        self._bases: dict[tuple[int, ...], _Base] = {}

    @property
    def has_convolutions(self) -> bool:
        """Return whether there is a dense convolution with many channels and a kernel above 1x1."""
        convs = [layer for layer in self.teacher.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d))]
        dense = [conv for conv in convs if conv.groups == 1 and max(conv.kernel_size) > 1]
        return any(conv.in_channels >= FEWEST_INPUTS for conv in dense)

    def has_linear_of(self, size: int) -> bool:
        """Return whether a Linear layer has at least so many inputs and outputs."""
        linears = [layer for layer in self.teacher.modules() if isinstance(layer, nn.Linear)]
        return any(min(linear.in_features, linear.out_features) >= size for linear in linears)

    def params_with(self, layers: int) -> int:
        """Return the parameters of the teacher with so many layers of every stack."""
        return count_params(self._base(tuple(keeping(layers)(stack) for stack in self.stacks)).module)[0]

    def build(self, params: Derived, *, fit: bool) -> tuple[nn.Module, Outcome]:
        """Build a student on the run's device, with the outcome.

        Args:
            params: of one method of derivation.
            fit: whether it is to be trained: fitted, and proven to run. Else only its size counts.

        Raises:
            TechniqueError: nothing changes, or the student does not run.
        """
        shortened = params.depth < 1 or isinstance(params, FewerLayers)
        count = stays(params)
        base = self._base(tuple(count(stack) if shortened else len(stack.units) for stack in self.stacks))
        module = copy.deepcopy(base.module)
        steps = [bridged(module, self.teacher, base.short, self._run) if fit else base.short.outcome]
        if params.width < 1:
            if base.narrowing is None:
                base.narrowing = find_narrowing(base.module, base.short.selection, self._run)
            steps.append(narrow(module, base.narrowing, params, self._run, fit))
        replace = _replacement(params)
        if replace is not None:
            steps.append(replace(module, base.short.selection, self._run, fit))
        outcome = joined(steps)
        if not fit:
            return module, outcome
        if not outcome.changed:
            raise TechniqueError("the student would equal the teacher", "nothing can be removed, or nothing has to be")
        return module, finish(module, params, outcome, self._shapes, self._run)

    def _base(self, kept: tuple[int, ...]) -> _Base:
        if kept not in self._bases:
            module = copy.deepcopy(self.teacher)
            counts = dict(zip(self.stacks, kept, strict=True))
            short = Shortened(Outcome([]), self._chosen)
            if any(count < len(stack.units) for stack, count in counts.items()):
                short = shorten(module, self._chosen, counts.__getitem__, self._run)
            self._bases[kept] = _Base(module, short)
        return self._bases[kept]


def _replacement(params: Derived) -> Replace | None:
    """Return the layer replacement that follows depth and width reduction."""
    if isinstance(params, Depthwise):
        return depthwise.replace
    if isinstance(params, InvertedResidual):
        return partial(inverted_residual.replace, params.expansion)
    if isinstance(params, LowRank):
        return partial(low_rank.replace, params.rank_ratio)
    return None
