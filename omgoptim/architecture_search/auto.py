"""Search space of a given model: its layers cut into stages, and the possible replacements of each stage.

Each option is tried once alone: options that cannot be applied or save no parameters are dropped. A configuration is
built by applying the options stage by stage on the model's own weights; narrowing comes last, since it also changes the
layers of the next stage that read its channels. The size of the images is a choice of its own, applied at the end.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from omgoptim.architecture_search.derivation import INPUT_SIZE, INPUT_SIZES, KEEP, OPTIONS, derived, resized
from omgoptim.architecture_search.space import Configuration, Knob, Space
from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.techniques.registry import ModuleRun

MOST_STAGES = 12
"""Upper bound of the request's stages: with five options each, 12 stages make 2.4e8 configurations."""
MOST_OPTIONS = 5
"""Maximum options of a stage: each is built once, and the surrogate has a weight for each."""

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layers that the options change."""

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class LayerStage:
    """Neighbouring layers that are changed together."""

    name: str
    targets: tuple[str, ...]
    """Globs on module paths, which name its layers."""
    params: int


@dataclass(frozen=True)
class AutoSpace:
    """Search space of a model, and the function that builds its networks."""

    model: nn.Module
    stages: tuple[LayerStage, ...]
    space: Space
    left_out: tuple[tuple[str, str], ...] = ()
    """Dropped options, as `stage: option`, each with its reason."""

    def build(self, configuration: Configuration, run: ModuleRun) -> nn.Module:
        """Return a new module with inherited weights, in eval mode; the model is not changed.

        Raises:
            RequestError: the configuration is not one of the space.
            TechniqueError: options that work alone do not work together.
        """
        self.space.row(configuration)
        module = copy.deepcopy(self.model).eval()
        chosen = [(stage, str(configuration.get(stage.name, KEEP))) for stage in self.stages]
        for stage, option in sorted(chosen, key=lambda each: each[1].startswith("narrow")):
            if option != KEEP:
                module = derived(module, option, stage.targets, run)
        scale = str(configuration.get(INPUT_SIZE, KEEP))
        return module if scale == KEEP else resized(module, float(scale), run)


def auto_space(model: nn.Module, run: ModuleRun, stages: int = 10, progress: Progress | None = None) -> AutoSpace:
    """Find the possible replacements of each stage of a model.

    Args:
        model: in eval mode; not changed.
        run: how it is called, with real batches.
        stages: how many stages to cut it into, at most; up to 12.
        progress: `progress(stage, fraction)`, called before each stage.

    Raises:
        TechniqueError: no option can be applied anywhere.
    """
    found = stages_of(model, min(stages, MOST_STAGES))
    knobs, kept, left_out = [], [], []
    for number, stage in enumerate(found):
        if progress is not None:
            progress(f"trying the replacements of {stage.name}", number / len(found))
        options, reasons = _options(model, stage, run)
        left_out += reasons
        if options:
            knobs.append(Knob(stage.name, (KEEP, *options)))
            kept.append(stage)
    sizes = [scale for scale in INPUT_SIZES if _can_be_resized(model, float(scale), run)]
    if sizes:
        knobs.append(Knob(INPUT_SIZE, (KEEP, *sizes)))
    if not knobs:
        raise TechniqueError(
            "no part of this model can be varied",
            "; ".join(f"{where}: {why}" for where, why in left_out[:5]) or "it has no convolution and no Linear layer",
            "give a search space of your own: a function space(trial) that returns a module",
        )
    return AutoSpace(model, tuple(kept), Space(tuple(knobs)), tuple(left_out))


def stages_of(model: nn.Module, most: int) -> list[LayerStage]:
    """Cut the layers of a model into at most so many stages, along its own containers.

    The root is opened first, then always the container of most parameters whose parts fit. When none fits, the largest
    one's parts are put together, neighbours with neighbours, into as many stages as are left.
    """
    parts = [[("", model)]]
    while True:
        closed = [part for part in parts if len(part) == 1 and _children(part[0])]
        closed.sort(key=lambda part: -count_params(part[0][1])[0])
        left = most - len(parts) + 1
        fitting = next((part for part in closed if len(_children(part[0])) <= left), None)
        if fitting is None:
            break
        at = parts.index(fitting)
        parts[at : at + 1] = [[child] for child in _children(fitting[0])]
    if closed and left > 1:
        at = parts.index(closed[0])
        parts[at : at + 1] = _grouped(_children(closed[0][0]), left)
    return [
        LayerStage(
            part[0][0] or "model",
            tuple(glob for path, module in part for glob in _globs(path, module)),
            sum(count_params(module)[0] for _, module in part),
        )
        for part in parts
        if any(_has_weighted(module) for _, module in part)
    ]


def _grouped(children: list[tuple[str, nn.Module]], groups: int) -> list[list[tuple[str, nn.Module]]]:
    """Merge neighbours into groups whose sizes differ by one at most."""
    edges = [len(children) * number // groups for number in range(groups + 1)]
    return [children[start:end] for start, end in itertools.pairwise(edges)]


def _children(part: tuple[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return the parts of a container that is split: at least two, or none."""
    path, module = part
    if isinstance(module, WEIGHTED):
        return []
    prefix = f"{path}." if path else ""
    inside = [(prefix + name, child) for name, child in module.named_children() if _has_weighted(child)]
    return _children(inside[0]) if len(inside) == 1 else inside


def _has_weighted(module: nn.Module) -> bool:
    return any(isinstance(each, WEIGHTED) for each in module.modules())


def _globs(path: str, module: nn.Module) -> tuple[str, ...]:
    if not path:
        return ("*",)
    return (path,) if isinstance(module, WEIGHTED) else (path, f"{path}.*")


def _options(model: nn.Module, stage: LayerStage, run: ModuleRun) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the options that work on a stage and make it smaller, and the others with their reasons."""
    before = count_params(model)[0]
    options: list[str] = []
    reasons: list[tuple[str, str]] = []
    for option in OPTIONS:
        where = f"{stage.name}: {option}"
        try:
            module = derived(model, option, stage.targets, run)
        except OmgoptimError as error:
            reasons.append((where, error.reason))
            continue
        if count_params(module)[0] >= before:
            reasons.append((where, "it saves no parameters"))
        else:
            options.append(option)
    return _varied(options), reasons


def _can_be_resized(model: nn.Module, scale: float, run: ModuleRun) -> bool:
    try:
        resized(copy.deepcopy(model), scale, run)
    except OmgoptimError:
        return False
    return True


def _varied(options: Sequence[str]) -> list[str]:
    """Return at most four options beside `keep`: of more, the mildest narrowing and low rank are left out first."""
    kept = list(options)
    for spare in ("narrow 0.75", "low rank", "narrow 0.25"):
        if len(kept) < MOST_OPTIONS:
            break
        if spare in kept:
            kept.remove(spare)
    return kept[: MOST_OPTIONS - 1]
