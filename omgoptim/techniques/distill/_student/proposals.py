"""Candidate students of `student auto`: each technique at the largest size within the parameter budget.

For every technique that suits the teacher, the largest width (or rank ratio) within the budget is found by building and
counting a few students. Of students of one size those with more multiply-accumulates per parameter come first: they
have more capacity. Depth and width shrink together by EfficientNet's compound scaling (arXiv:1905.11946): layers by 1.2
where channels shrink by 1.1.

The search for a size is monotone over integers, in steps of 1/1000: first read off the curve that the count is expected
to follow, which is near at once where it does, then bisection, which ends in ten counts whatever the curve (false
position alone sticks at one end; scipy's brentq wants a continuous function, and this one is made of steps).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import Auto, Depthwise, Derived, FewerLayers, InvertedResidual, LowRank, Narrow
from omgoptim.techniques.distill import depthwise, inverted_residual, low_rank
from omgoptim.techniques.distill._student.block_replacement import MIN_INPUTS
from omgoptim.techniques.distill._student.derivation import (
    NO_REPEATS,
    Replace,
    Shortened,
    bridge_gaps,
    finish_student,
    keep_at_most,
    layers_to_keep,
    merge_outcomes,
    output_shapes,
    reduce_depth,
    reduce_width,
)
from omgoptim.techniques.distill._student.layer_selection import LayerSelection, find_stacks
from omgoptim.techniques.distill._student.narrowing import Narrowing, find_narrowing
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.registry import ModuleRun, Outcome

INTERPOLATIONS = 3
"""Interpolation steps before bisection: the curve's two unknowns are known after two, the third corrects rounding."""
MAX_EVALUATIONS = INTERPOLATIONS + 10
"""Maximum evaluations beside that at the upper end: ten bisections end a search over 1,000 steps."""
GOAL_TOLERANCE = 0.97
"""Fraction of the goal at which the search stops. Chosen: the last 3 % of the size would cost more builds."""
RESOLUTION = 1000
"""Resolution of the search: x is a multiple of 1/1000. Chosen: finer than one channel of most layers."""

MIN_RATIO = 0.02
"""Minimum width and rank ratio that is tried, a fiftieth of a layer. Chosen: less is hard to train."""
MAX_RANK_RATIO = 0.9
"""Maximum rank ratio: above it two factors save less than 10 % of the parameters and cost time."""
MIN_LINEAR_SIZE = 32
"""Minimum inputs and outputs of a Linear layer that is factorized. Chosen: others have under 1,024 weights."""
DEEPER, WIDER = math.log(1.2), math.log(1.1)
"""Logarithms of depth and width per step of compound scaling: arXiv:1905.11946 (1.2 and 1.1)."""
PLAIN_WIDTHS = (1.0, 0.75)
"""Widths tried when `keep_layers` decides the size. Chosen: all channels, and about half of their weights."""
COMPRESSIONS_PER_SPEEDUP = (2.0, 4.0)
"""Compressions per requested speedup, if that is the only target. Chosen: time falls by less than parameters."""


def largest_within(
    count: Callable[[float], int], goal: float, low_end: float, high_end: float = 1.0, power: float = 2
) -> tuple[float | None, int]:
    """Return about the largest x in range with count(x) <= goal, and its count; None and the least count else.

    The bracket is kept: count(low) <= goal < count(high). The first tries are where the curve a + b x^power through its
    ends reaches the goal, then it is halved.

    Args:
        count: does not fall with x; called at most `MAX_EVALUATIONS` + 1 times.
        goal: upper bound of the count.
        low_end: lower end of x, 0..1.
        high_end: upper end of x, 0..1.
        power: exponent of the curve, 2 where parameters go with the square of the width.
    """
    high, low = (
        round(high_end * RESOLUTION),
        round(low_end * RESOLUTION) - 1,
    )  # what fits lies above low, what is too large at high
    at = {high: count(high_end)}
    if at[high] <= goal:
        return high_end, at[high]
    start, at[0] = 0, 0  # the curve begins at nothing until a count within the goal is known
    for tried in range(MAX_EVALUATIONS):
        if high - low <= 1:
            break
        x = _interpolate(start, high, at, goal, power) if tried < INTERPOLATIONS else (low + high) // 2
        x = min(max(x, low + 1), high - 1)
        at[x] = count(x / RESOLUTION)
        if at[x] <= goal:
            start = low = x
            if at[x] >= GOAL_TOLERANCE * goal:
                break
        else:
            if start == 0:  # more is fixed than was thought
                at[0] = max(at[0], _constant_term((x, at[x]), (high, at[high]), power))
            high = x
    return (low / RESOLUTION, at[low]) if start else (None, at[high])


def _interpolate(low: int, high: int, at: dict[int, int], goal: float, power: float) -> int:
    """Return the x at which the curve through two points reaches the goal, rounded down."""
    if at[high] <= at[low]:
        return (low + high) // 2
    share = max((goal - at[low]) / (at[high] - at[low]), 0.0)
    raised = float(low) ** power + share * (float(high) ** power - float(low) ** power)
    return math.floor(float(raised ** (1 / power)))


def _constant_term(first: tuple[int, int], second: tuple[int, int], power: float) -> int:
    """Return the count at 0 of the curve through two points: the part that does not depend on x."""
    slope = (second[1] - first[1]) / (float(second[0]) ** power - float(first[0]) ** power)
    return max(0, int(first[1] - slope * float(first[0]) ** power))


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
        return any(conv.in_channels >= MIN_INPUTS for conv in dense)

    def has_linear_of(self, size: int) -> bool:
        """Return whether a Linear layer has at least so many inputs and outputs."""
        linears = [layer for layer in self.teacher.modules() if isinstance(layer, nn.Linear)]
        return any(min(linear.in_features, linear.out_features) >= size for linear in linears)

    def params_with(self, layers: int) -> int:
        """Return the parameters of the teacher with so many layers of every stack."""
        return count_params(self._base(tuple(keep_at_most(layers)(stack) for stack in self.stacks)).module)[0]

    def build(self, params: Derived, *, fit: bool) -> tuple[nn.Module, Outcome]:
        """Build a student on the run's device, with the outcome.

        Args:
            params: of one method of derivation.
            fit: whether it is to be trained: fitted, and proven to run. Else only its size counts.

        Raises:
            TechniqueError: nothing changes, or the student does not run.
        """
        shortened = params.depth < 1 or isinstance(params, FewerLayers)
        count = layers_to_keep(params)
        base = self._base(tuple(count(stack) if shortened else len(stack.units) for stack in self.stacks))
        module = copy.deepcopy(base.module)
        steps = [bridge_gaps(module, self.teacher, base.short, self._run) if fit else base.short.outcome]
        if params.width < 1:
            if base.narrowing is None:
                base.narrowing = find_narrowing(base.module, base.short.selection, self._run)
            steps.append(reduce_width(module, base.narrowing, params, self._run, fit))
        replace = _replacement(params)
        if replace is not None:
            steps.append(replace(module, base.short.selection, self._run, fit))
        outcome = merge_outcomes(steps)
        if not fit:
            return module, outcome
        if not outcome.changed:
            raise TechniqueError("the student would equal the teacher", "nothing can or has to be removed")
        return module, finish_student(module, params, outcome, self._shapes, self._run)

    def _base(self, kept: tuple[int, ...]) -> _Base:
        if kept not in self._bases:
            module = copy.deepcopy(self.teacher)
            counts = dict(zip(self.stacks, kept, strict=True))
            short = Shortened(Outcome([]), self._chosen)
            if any(count < len(stack.units) for stack, count in counts.items()):
                short = reduce_depth(module, self._chosen, counts.__getitem__, self._run)
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


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate student."""

    params: Derived
    """Parameters that derive it."""
    module: nn.Module
    outcome: Outcome
    params_count: int
    macs: int | None
    """Multiply-accumulates of one sample."""


@dataclass(frozen=True, slots=True)
class _Method:
    """Derivation method, at any size."""

    name: str
    at: Callable[[float], Derived]
    """Params at a width or rank ratio in 0..1."""
    power: int = 2
    """Approximate exponent of the number of parameters over the width."""
    max_ratio: float = 1.0

    def at_only(self, width: float) -> _Method:
        """Return the method at one width, whatever size is asked for."""
        return _Method(f"{self.name}, width {width:g}", lambda _: self.at(width))


def proposals(
    teacher: nn.Module, auto: Auto, run: ModuleRun, compression: float | None
) -> tuple[list[Proposal], list[tuple[str, str]]]:
    """Return the most promising students, best first, and the methods without one, each with the reason.

    Args:
        teacher: brought to the run's device; else not changed.
        auto: how many at most, and what stays.
        run: how the teacher is called, and its batches.
        compression: parameters of the teacher over the student's, at least; None where the layers to keep, or a
            speedup, are the only goal.

    Raises:
        TechniqueError: a glob names no layer, or the teacher does not run.
    """
    builder = StudentBuilder(teacher.to(run.device), auto, run)
    if auto.keep_layers and not builder.stacks:
        return [], [("keep_layers", NO_REPEATS)]
    found: dict[object, Proposal] = {}
    rejected: list[tuple[str, str]] = []
    methods = list(_methods_with_goals(builder, auto, compression))
    for index, (method, goal) in enumerate(methods):
        run.progress(f"deriving students: {method.name}", index / len(methods))
        try:
            params, why = _largest_within_goal(builder, method, goal) if goal else (method.at(1.0), "")
            if params is None:
                rejected.append((method.name, why))
                continue
            proposal = _proposal(builder, params, run)
        except OmgoptimError as error:
            rejected.append((method.name, error.reason))
            continue
        found.setdefault(tuple((name, tensor.shape) for name, tensor in proposal.module.state_dict().items()), proposal)
    likeliest = sorted(found.values(), key=lambda each: (-(each.macs or 0), -each.params_count))
    return likeliest[: auto.candidates], list(dict.fromkeys(rejected))


def _methods_with_goals(
    builder: StudentBuilder, auto: Auto, compression: float | None
) -> Iterator[tuple[_Method, float | None]]:
    """Yield every method that suits the teacher, with the parameter budget of its student."""
    total = builder.params
    if compression is not None:
        for method in _methods(builder, auto, compression):
            yield method, total / compression
    elif auto.keep_layers is not None:
        for method in _methods(builder, auto, 1.0):
            for width in PLAIN_WIDTHS if method.power > 1 else (1.0,):
                yield method.at_only(width), None
    else:
        for times in COMPRESSIONS_PER_SPEEDUP:
            target = times * (auto.target_speedup or 1.0)
            for method in _methods(builder, auto, target):
                yield method, total / target


def _methods(builder: StudentBuilder, auto: Auto, compression: float) -> Iterator[_Method]:
    """Yield the methods that suit the teacher; with layers to keep, each keeps them."""
    globs = {"targets": auto.targets, "ignore": auto.ignore}
    shares = {round(auto.keep_layers / len(stack.units), 4) for stack in builder.stacks} if auto.keep_layers else {1.0}
    depth = min(1.0, *shares)
    if auto.keep_layers is not None:
        kept = partial(FewerLayers, keep_layers=auto.keep_layers, **globs)
        yield _Method("fewer layers", lambda width: kept(width=width))
    else:
        yield _Method("narrow", lambda width: Narrow(width=width, **globs))
        if builder.stacks:
            steps = math.log(compression) / (DEEPER + 2 * WIDER)
            shallow = round(math.exp(-steps * DEEPER), 3)
            yield _Method("narrow with fewer layers", lambda width: Narrow(width=width, depth=shallow, **globs))
            few = _layers_for(builder, builder.params / compression)
            yield _Method("fewer layers", lambda width: FewerLayers(keep_layers=few, width=width, **globs))
    if len(shares) > 1:  # one fraction of the depth would not keep so many layers of every stack
        return
    if builder.has_convolutions:
        yield _Method("depthwise", lambda width: Depthwise(width=width, depth=depth, **globs))
        yield _Method("inverted residual", lambda width: InvertedResidual(width=width, depth=depth, **globs))
    if builder.has_linear_of(MIN_LINEAR_SIZE):
        at = partial(LowRank, depth=depth, **globs)
        if compression > 1:
            yield _Method("low rank", lambda share: at(rank_ratio=share), 1, MAX_RANK_RATIO)
        yield _Method("low rank, narrower", lambda width: at(width=width))


def _layers_for(builder: StudentBuilder, goal: float) -> int:
    """Return how many layers of each stack make a student of `goal` parameters; half where none does."""
    most = max(len(stack.units) for stack in builder.stacks)
    small_enough = (layers for layers in range(most - 1, 0, -1) if builder.params_with(layers) <= goal)
    return next(small_enough, max(1, most // 2))


def _largest_within_goal(builder: StudentBuilder, method: _Method, goal: float) -> tuple[Derived | None, str]:
    """Return the params of the largest student within the goal; or None and the reason."""

    def count(x: float) -> int:
        return count_params(builder.build(method.at(x), fit=False)[0])[0]

    x, fewest = largest_within(count, goal, MIN_RATIO, method.max_ratio, method.power)
    if x is None:
        return None, f"its smallest student has {fewest:,} parameters, more than the target of {goal:,.0f}"
    return method.at(x), ""


def _proposal(builder: StudentBuilder, params: Derived, run: ModuleRun) -> Proposal:
    module, outcome = builder.build(params, fit=True)
    probe = Probe.of(run)
    macs = count_macs(module, probe.args, probe.kwargs).macs
    return Proposal(params, module.cpu(), outcome, count_params(module)[0], macs)
