"""Derivation of networks for the search by the student deriver of `distill`, with inherited weights."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.requests import Params
from omgoptim.requests.distill import Depthwise, FewerLayers, InvertedResidual, LowRank, Narrow
from omgoptim.techniques.registry import ModuleRun, apply_to_module

KEEP = "keep"
OPTIONS = ("narrow 0.75", "narrow 0.5", "narrow 0.25", "depthwise", "inverted residual", "drop layer", "low rank")
"""Ways to change a stage, in the order in which they are offered."""


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
