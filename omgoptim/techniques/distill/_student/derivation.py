"""Derivation of a student from its teacher: depth, width, replacement, initialization.

Common to all ways of derivation: depth first, then width, then the technique's replacement, each on the result of the
step before; then random weights where requested, and the check that the student runs with the teacher's inputs and
gives outputs of the same shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import running_layers
from omgoptim.reports import Skip
from omgoptim.requests.distill import Derived, FewerLayers
from omgoptim.runtimes.signature import flatten
from omgoptim.techniques.distill._student.layer_bridging import Span, fit_spans
from omgoptim.techniques.distill._student.layer_selection import (
    LayerSelection,
    Stack,
    drop_layers,
    find_stacks,
    paths_of,
)
from omgoptim.techniques.distill._student.narrowing import Narrowing, find_narrowing, narrow_to
from omgoptim.techniques.probe import Probe, error_location, quiet_output
from omgoptim.techniques.registry import ModuleRun, Outcome

Shapes = list[tuple[int, ...]]

DEFAULT_DEPTH = 0.5
"""Fraction of the repeated layers that `fewer_layers` keeps by default, as in DistilBERT (arXiv:1910.01108)."""

Replace = Callable[[nn.Module, LayerSelection, ModuleRun, bool], Outcome]
"""`replace(module, selection, run, fit)`: replaces layers of the module; may change nothing."""

NO_REPEATS = (
    "no layer repeats: no ModuleList or Sequential has consecutive equal layers whose output has the input's shape"
)


def output_shapes(module: nn.Module, run: ModuleRun) -> Shapes:
    """Return the output shapes of a module for a batch.

    Raises:
        TechniqueError: it raises, with the innermost layer that did.
    """
    probe = Probe.of(run)
    try:
        with (
            running_layers(module) as inside,
            evaluation_mode(module),
            quiet_output(),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(0)
            result = module(*probe.args, **probe.kwargs)
    except Exception as error:  # whatever a user's forward raises without what it expects
        place = f"layer '{inside[-1]}'" if inside and inside[-1] else "the model's forward method"
        raise TechniqueError(
            "the student does not run",
            f"{place} failed: {error_location(error)}",
            "add the layer whose size forward assumes to ignore; or compute sizes from the tensors (x.flatten(1), "
            "x.shape, len(self.layers)) instead of fixed numbers; or give your own student",
        ) from error
    return [tuple(leaf.shape) for leaf in flatten(result) if isinstance(leaf, Tensor)]


def refuse_other_shapes(student: nn.Module, teacher: Shapes, run: ModuleRun) -> None:
    """Raise a TechniqueError where a student does not run, or gives other shapes than its teacher's."""
    shapes = output_shapes(student, run)
    if shapes != teacher:
        raise TechniqueError(
            "the student's outputs have other shapes than the teacher's",
            f"student {shapes}, teacher {teacher}, for a batch of 2",
            "add the layers that compute the outputs to ignore",
        )


@dataclass(frozen=True, slots=True)
class Shortened:
    """A module after depth reduction."""

    outcome: Outcome
    selection: LayerSelection
    """Layers that may change, by their present paths."""
    spans: tuple[Span, ...] = ()
    """Kept layers, with the span that each replaces."""


def derive(module: nn.Module, params: Derived, run: ModuleRun, replace: Replace | None = None) -> Outcome:
    """Derive a student from a copy of the teacher, in place.

    Args:
        module: a copy of the teacher.
        params: depth, width, and the layers that globs allow.
        run: how the teacher is called, and its batches.
        replace: what comes after depth and width; None for nothing.

    Raises:
        TechniqueError: nothing of the teacher changes, or the student does not run as it does.
    """
    shapes = output_shapes(module, run)
    fit = params.initialize == "teacher"
    short = Shortened(Outcome([]), LayerSelection.of(module, params))
    if params.depth < 1 or isinstance(params, FewerLayers):
        run.progress("finding repeated layers", 0.0)
        short = reduce_depth(module, short.selection, layers_to_keep(params), run)
    steps = [bridge_gaps(module, run.original, short, run) if fit else short.outcome]
    if params.width < 1:
        run.progress("finding narrowable channels", 0.1)
        steps.append(reduce_width(module, find_narrowing(module, short.selection, run), params, run, fit))
    if replace is not None:
        run.progress("replacing layers", 0.7)
        steps.append(replace(module, short.selection, run, fit))
    outcome = merge_outcomes(steps)
    if not outcome.changed:
        raise _unchanged(params, outcome.skipped)
    return finish_student(module, params, outcome, shapes, run)


def finish_student(
    module: nn.Module, params: Derived, outcome: Outcome, shapes: list[tuple[int, ...]], run: ModuleRun
) -> Outcome:
    """Reinitialize the student where the params ask for it, and check that it runs.

    Args:
        module: the student.
        params: with the initialization that they ask for.
        outcome: of the derivation so far.
        shapes: of the teacher's outputs.
        run: how the teacher is called.

    Raises:
        TechniqueError: it does not, or gives other shapes.
    """
    if params.initialize == "random":
        reinitialize(module, run.seed)
    refuse_other_shapes(module, shapes, run)
    return outcome


def layers_to_keep(params: Derived) -> Callable[[Stack], int]:
    """Return how many units of a stack stay: the layers to keep, or the fraction; at least one."""
    if isinstance(params, FewerLayers) and params.depth == 1:
        if params.keep_layers is not None:
            return keep_at_most(params.keep_layers)
        return lambda stack: _share(stack, DEFAULT_DEPTH)
    return lambda stack: _share(stack, params.depth)


def keep_at_most(layers: int) -> Callable[[Stack], int]:
    """Keep so many units of every stack, or all where it has fewer."""
    return lambda stack: min(layers, len(stack.units))


def _share(stack: Stack, depth: float) -> int:
    return max(1, math.floor(len(stack.units) * depth + 0.5))


def reduce_depth(
    module: nn.Module, selection: LayerSelection, count: Callable[[Stack], int], run: ModuleRun
) -> Shortened:
    """Reduce every stack to `count(stack)` units, in place."""
    stacks = find_stacks(module, selection, run)
    keep = {stack: count(stack) for stack in stacks}
    before = paths_of(module)
    spans = tuple(span for stack in stacks for span in _spans(module, stack, keep[stack]))
    unshortened = [
        Skip(path=path, reason=f"all {len(stack.units)} repeated layers are to be kept", kind="no_benefit")
        for stack in stacks
        if count(stack) >= len(stack.units)
        for path in stack.paths
    ]
    changed = drop_layers(module, stacks, keep)
    if changed:
        selection = selection.after(before, module)
    one_module = "the {} is one module: its {} layers cannot be removed one by one"
    skipped = [
        Skip(path=path, reason=one_module.format(type(layer).__name__, layer.num_layers), kind="unsupported")
        for path, layer in module.named_modules()
        if isinstance(layer, nn.RNNBase) and layer.num_layers > 1
    ]
    return Shortened(Outcome(changed, [*unshortened, *skipped]), selection, spans if changed else ())


def _spans(module: nn.Module, stack: Stack, keep: int) -> list[Span]:
    """Return the span that each kept unit stands for, in a stack whose units are single children of one container.

    Args:
        module: before any layer went.
        stack: of repeated layers.
        keep: units that stay.
    """
    if len(stack.paths) > 1 or any(len(unit) > 1 for unit in stack.units) or keep >= len(stack.units):
        return []
    (path,) = stack.paths
    names, prefix = list(module.get_submodule(path)._modules), f"{path}." if path else ""
    removed_units = set(range(len(stack.units))) - set(stack.spread(keep))
    removed = {stack.units[index][0] for index in removed_units}
    kept = [child for child in range(len(names)) if child not in removed]
    last = stack.units[-1][0]
    ends = [*(child - 1 for child in kept[1:]), len(names) - 1]
    numbered = names == [str(index) for index in range(len(names))]
    new_names = [str(new) if numbered else names[old] for new, old in enumerate(kept)]
    return [
        Span(f"{prefix}{name}", f"{prefix}{names[min(end, last)]}")
        for name, old, end in zip(new_names, kept, ends, strict=True)
        if stack.units[0][0] <= old <= last
    ]


def bridge_gaps(module: nn.Module, teacher: nn.Module, short: Shortened, run: ModuleRun) -> Outcome:
    """Fit the kept layers to the outputs of the removed ones, in place, where there are real inputs.

    Returns:
        What was done to the layers, with a note of it.
    """
    if not (short.spans and run.real):
        return short.outcome
    run.progress("fitting the kept layers", 0.05)
    fitted = fit_spans(module, teacher, short.spans, run)
    if not fitted:
        return short.outcome
    note = f"{len(fitted)} kept layers were fitted, without labels, to the outputs of the removed layers after them."
    return dataclasses.replace(short.outcome, notes=[*short.outcome.notes, note])


def reduce_width(module: nn.Module, narrowing: Narrowing, params: Derived, run: ModuleRun, fit: bool) -> Outcome:
    """Narrow everything that can shrink to the width of `params`, in place."""
    if not narrowing.is_possible or params.width >= 1:
        return Outcome([], list(narrowing.skipped))
    return narrow_to(module, narrowing, params.width, run, fit=fit, round_to=params.round_to)


def merge_outcomes(steps: Sequence[Outcome]) -> Outcome:
    """Merge the outcomes of several steps; a layer whose own channels one of them changed was not skipped."""
    changed = [change for step in steps for change in step.changed]
    paths = {change.path for change in changed if not change.indirect}
    skipped = {skip.path: skip for step in steps for skip in step.skipped if skip.path not in paths}
    return Outcome(changed, list(skipped.values()), [note for step in steps for note in step.notes])


def _unchanged(params: Derived, skipped: Sequence[Skip]) -> TechniqueError:
    reasons = list(dict.fromkeys(f"{skip.path}: {skip.reason}" for skip in skipped))[:3]
    if isinstance(params, FewerLayers):
        return TechniqueError(
            "no layer of this model can be removed",
            "; ".join(reasons) or NO_REPEATS,
            "use student narrow (fewer channels), depthwise or low_rank, or give your own student",
        )
    return TechniqueError(
        "no layer of this model can be narrowed",
        "; ".join(reasons) or "it has no removable channels, heads or hidden units"
        if params.width < 1
        else "width and depth are 1",
        "use student fewer_layers (repeated layers) or low_rank (large Linear layers), or give your own student",
    )


def reinitialize(module: nn.Module, seed: int) -> None:
    """Reinitialize every layer in place; the same ones for the same seed.

    A layer's own `reset_parameters` is called; where it has none, each of its tensors is drawn from a normal
    distribution of the mean and the deviation that it has. Buffers that no layer resets stay.
    """
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        torch.manual_seed(seed)
        for layer in module.modules():
            parameters = [tensor for tensor in layer._parameters.values() if tensor is not None]
            if not parameters:
                continue
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for tensor in parameters:
                if tensor.is_floating_point():
                    deviation = float(tensor.std()) if tensor.numel() > 1 else 0.0
                    tensor.normal_(float(tensor.mean()), deviation)
