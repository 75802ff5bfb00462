"""Candidate students of `student auto`: each technique at the largest size within the parameter budget.

For every technique that suits the teacher, the largest width (or rank ratio) within the budget is found by building and
counting a few students. Of students of one size those with more multiply-accumulates per parameter come first: they
have more capacity. Depth and width shrink together by EfficientNet's compound scaling (arXiv:1905.11946): layers by 1.2
where channels shrink by 1.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from omgoptim.errors import OmgoptimError
from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import Auto, Depthwise, Derived, FewerLayers, InvertedResidual, LowRank, Narrow
from omgoptim.techniques.distill._student.derivation import NO_REPEATS
from omgoptim.techniques.distill._student.monotone_search import largest_within
from omgoptim.techniques.distill._student.student_builder import StudentBuilder
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.registry import ModuleRun, Outcome

LEAST = 0.02
"""Minimum width and rank ratio that is tried: a fiftieth of a layer."""
MOST_RANK = 0.9
"""Maximum rank ratio: above it two factors save less than 10 % of the parameters and cost time."""
LARGE = 32
"""Minimum inputs and outputs of a Linear layer that is worth factorizing."""
DEEPER, WIDER = math.log(1.2), math.log(1.1)
"""Logarithms of depth and width per step of compound scaling: arXiv:1905.11946 (1.2 and 1.1)."""
PLAIN_WIDTHS = (1.0, 0.75)
"""Widths that are tried when `keep_layers` decides the student's size."""
FOR_SPEED = (2.0, 4.0)
"""Compressions per unit of requested speedup, when speedup is the only target: time falls by less than parameters."""


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
class _Way:
    """A way of derivation, of any size."""

    name: str
    at: Callable[[float], Derived]
    """Params at a width or rank ratio in 0..1."""
    power: int = 2
    """Approximate exponent of the number of parameters over the width."""
    most: float = 1.0


def proposals(
    teacher: nn.Module, auto: Auto, run: ModuleRun, compression: float | None
) -> tuple[list[Proposal], list[tuple[str, str]]]:
    """Return the most promising students, the best first, and the ways without one: name and reason.

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
    passed_over: list[tuple[str, str]] = []
    wanted = list(_wanted(builder, auto, compression))
    for index, (way, goal) in enumerate(wanted):
        run.progress(f"deriving students: {way.name}", index / len(wanted))
        try:
            params, why = _sized(builder, way, goal) if goal else (way.at(1.0), "")
            if params is None:
                passed_over.append((way.name, why))
                continue
            made = _proposal(builder, params, run)
        except OmgoptimError as error:
            passed_over.append((way.name, f"{error.what}: {error.why}" if error.why else error.what))
            continue
        found.setdefault(tuple((name, tensor.shape) for name, tensor in made.module.state_dict().items()), made)
    likeliest = sorted(found.values(), key=lambda each: (-(each.macs or 0), -each.params_count))
    return likeliest[: auto.candidates], list(dict.fromkeys(passed_over))


def _wanted(builder: StudentBuilder, auto: Auto, compression: float | None) -> Iterator[tuple[_Way, float | None]]:
    """Return every way that suits the teacher, with the most parameters that its student may have."""
    total = builder.params
    if compression is not None:
        for way in _ways(builder, auto, compression):
            yield way, total / compression
    elif auto.keep_layers is not None:
        for way in _ways(builder, auto, 1.0):
            for width in PLAIN_WIDTHS if way.power > 1 else (1.0,):
                yield _Way(f"{way.name} at width {width:g}", partial(_fixed, way, width)), None
    else:
        for times in FOR_SPEED:
            wished = times * (auto.target_speedup or 1.0)
            for way in _ways(builder, auto, wished):
                yield way, total / wished


def _fixed(way: _Way, width: float, _: float) -> Derived:
    return way.at(width)


def _ways(builder: StudentBuilder, auto: Auto, compression: float) -> Iterator[_Way]:
    """Return the ways that suit the teacher; with layers to keep, every one keeps them."""
    whose = {"targets": auto.targets, "ignore": auto.ignore}
    shares = {round(auto.keep_layers / len(stack.units), 4) for stack in builder.stacks} if auto.keep_layers else {1.0}
    depth = min(1.0, *shares)
    if auto.keep_layers is not None:
        kept = partial(FewerLayers, keep_layers=auto.keep_layers, **whose)
        yield _Way("fewer layers", lambda width: kept(width=width))
    else:
        yield _Way("narrow", lambda width: Narrow(width=width, **whose))
        if builder.stacks:
            steps = math.log(compression) / (DEEPER + 2 * WIDER)
            shallow = round(math.exp(-steps * DEEPER), 3)
            yield _Way("narrow with fewer layers", lambda width: Narrow(width=width, depth=shallow, **whose))
            few = _layers_for(builder, builder.params / compression)
            yield _Way("fewer layers", lambda width: FewerLayers(keep_layers=few, width=width, **whose))
    if len(shares) > 1:  # one fraction of the depth would not keep so many layers of every stack
        return
    if builder.has_convolutions:
        yield _Way("depthwise", lambda width: Depthwise(width=width, depth=depth, **whose))
        yield _Way("inverted residual", lambda width: InvertedResidual(width=width, depth=depth, **whose))
    if builder.has_linear_of(LARGE):
        at = partial(LowRank, depth=depth, **whose)
        if compression > 1:
            yield _Way("low rank", lambda share: at(rank_ratio=share), 1, MOST_RANK)
        yield _Way("low rank, narrower", lambda width: at(width=width))


def _layers_for(builder: StudentBuilder, goal: float) -> int:
    """Return how many layers of each stack make a student of `goal` parameters; half where none does."""
    most = max(len(stack.units) for stack in builder.stacks)
    for layers in range(most - 1, 0, -1):
        if builder.params_with(layers) <= goal:
            return layers
    return max(1, most // 2)


def _sized(builder: StudentBuilder, way: _Way, goal: float) -> tuple[Derived | None, str]:
    """Return the params of the largest student within the goal; or None and the reason."""

    def count(x: float) -> int:
        return count_params(builder.build(way.at(x), fit=False)[0])[0]

    x, fewest = largest_within(count, goal, LEAST, way.most, way.power)
    if x is None:
        return None, f"its smallest student has {fewest:,} parameters, and at most {goal:,.0f} are asked for"
    return way.at(x), ""


def _proposal(builder: StudentBuilder, params: Derived, run: ModuleRun) -> Proposal:
    module, outcome = builder.build(params, fit=True)
    probe = Probe.of(run)
    macs = count_macs(module, probe.args, probe.kwargs).macs
    return Proposal(params, module.cpu(), outcome, count_params(module)[0], macs)
