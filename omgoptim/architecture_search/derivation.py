"""Derivation of networks for the search by the student deriver of `distill`, with inherited weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from omgoptim.blocks import ResizedConv2d
from omgoptim.errors import TechniqueError
from omgoptim.requests import Params
from omgoptim.requests.distill import Depthwise, FewerLayers, InvertedResidual, LowRank, Narrow
from omgoptim.techniques.distill._student.derivation import output_shapes, refuse_other_shapes
from omgoptim.techniques.registry import ModuleRun, apply_to_module

KEEP = "keep"
OPTIONS = ("narrow 0.75", "narrow 0.5", "narrow 0.25", "depthwise", "inverted residual", "drop layer", "low rank")
"""Ways to change a stage, in the order in which they are offered."""

INPUT_SIZE = "input size"
INPUT_SIZES = ("0.75", "0.5")
"""Name of the knob that scales the input, and its options beside `keep`."""


def params_of(option: str, targets: tuple[str, ...]) -> Params:
    """Return the deriver's params for an option of the space, on the layers that globs name.

    Raises:
        KeyError: there is no such option.
    """
    globs = list(targets)
    kind, _, width = option.partition(" ")
    if kind == "narrow" and width in ("0.75", "0.5", "0.25"):
        return Narrow(width=float(width), targets=globs)
    ways: dict[str, Params] = {
        "depthwise": Depthwise(targets=globs),
        "inverted residual": InvertedResidual(targets=globs),
        "drop layer": FewerLayers(targets=globs),
        "low rank": LowRank(targets=globs),
    }
    return ways[option]


def derived(model: nn.Module, option: str, targets: tuple[str, ...], run: ModuleRun) -> nn.Module:
    """Return a copy of a model with an option applied to the layers that globs name, in eval mode.

    Args:
        model: not changed.
        option: name of the replacement, such as `narrow 0.5` or `depthwise`.
        targets: globs on module paths.
        run: how it is called, and real batches to fit what is left of the weights to.

    Raises:
        TechniqueError: the option changes nothing there, or cannot.
    """
    module = copy.deepcopy(model).eval()
    outcome = apply_to_module(module, params_of(option, targets), replace(run, original=copy.deepcopy(module)))
    if not outcome.changed:
        raise TechniqueError(f"'{option}' changes nothing of {', '.join(targets)}")
    return module.eval()


def resized(model: nn.Module, scale: float, run: ModuleRun) -> nn.Module:
    """Return the model with the input of its first convolution scaled, in place.

    Raises:
        TechniqueError: its images are not read by one convolution alone, or it does not run on smaller ones.
    """
    shapes = output_shapes(model, run)
    found = [
        path for path, layer in model.named_modules() if type(layer) is nn.Conv2d and _reads_input(model, layer, run)
    ]
    if len(found) != 1:
        raise TechniqueError(f"the input cannot be scaled: {len(found)} convolutions read it", "exactly one must")
    parent, _, name = found[0].rpartition(".")
    setattr(model.get_submodule(parent), name, ResizedConv2d.like(model.get_submodule(found[0]), scale))  # type: ignore[arg-type]
    refuse_other_shapes(model, shapes, run)
    return model


def _reads_input(model: nn.Module, layer: nn.Module, run: ModuleRun) -> bool:
    """Return whether the input of a layer is one of the model's own."""
    args, kwargs, _ = next(iter(run.calls()))
    given = [*args, *kwargs.values()]
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _layer, inputs: seen.extend(inputs[:1]))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        hook.remove()
    return any(inner.shape == outer.shape and torch.equal(inner, outer) for inner in seen for outer in given)
