"""Compatibility of a student with its teacher: same inputs, same output shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.runtimes.signature import flatten
from omgoptim.techniques.probe import Probe, error_location, quiet
from omgoptim.techniques.registry import ModuleRun

Shapes = list[tuple[int, ...]]


def output_shapes(module: nn.Module, run: ModuleRun) -> Shapes:
    """Return the output shapes of a module for a batch.

    Raises:
        TechniqueError: it raises, with the innermost layer that did.
    """
    probe = Probe.of(run)
    inside: list[str] = []

    def enter(path: str) -> Any:
        return lambda _layer, _args: inside.append(path)

    def leave(_layer: nn.Module, _args: Any, _output: Any) -> None:
        inside.pop()

    hooks = []
    for path, layer in module.named_modules():
        hooks += [layer.register_forward_pre_hook(enter(path)), layer.register_forward_hook(leave)]
    try:
        with evaluation_mode(module), quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            result = module(*probe.args, **probe.kwargs)
    except Exception as error:  # whatever a user's forward raises without what it expects
        place = f"layer '{inside[-1]}'" if inside and inside[-1] else "the model's own forward"
        raise TechniqueError(
            "the student does not run",
            f"{place} failed: {error_location(error)}",
            "name that layer, or what the forward takes from it, in ignore; sizes are best written from the tensors "
            "themselves (x.flatten(1), x.shape, len(self.layers)); or give a student of your own",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(leaf.shape) for leaf in flatten(result) if isinstance(leaf, Tensor)]


def refuse_other_shapes(student: nn.Module, teacher: Shapes, run: ModuleRun) -> None:
    """Raise a TechniqueError where a student does not run, or gives other shapes than its teacher's."""
    shapes = output_shapes(student, run)
    if shapes != teacher:
        raise TechniqueError(
            "the student gives outputs of other shapes than its teacher",
            f"{shapes} instead of {teacher}, for two samples",
            "name the layers that write the outputs in ignore",
        )
