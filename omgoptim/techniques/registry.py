"""The registry of techniques: frozen records, one per params class, filled by the `@technique` decorator.

Files under `techniques/<verb>/` are found by a flat listing. Nothing is swallowed: a file that does not import, or a
params class with two techniques, is an error.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omgoptim import techniques
from omgoptim.reports import Change, Skip
from omgoptim.requests import Params


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a technique did: layers changed, and layers left alone with the reason."""

    changed: list[Change]
    skipped: list[Skip] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """What a technique on programs gets besides its parameters."""

    calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]]
    """Calibration batches: input name to array, batch first. Empty without data."""
    scratch: Path
    """An existing folder for temporary files."""
    seed: int = 0
    threads: int = 1


ProgramTechnique = Callable[[Path, Path, Any, ProgramRun], Outcome]
"""`apply(source, target, params, run)`: reads the ONNX file `source`, writes the ONNX file `target`."""


@dataclass(frozen=True, slots=True)
class Technique:
    """A registered technique and what must hold for it to be tried."""

    params: type[Params]
    apply: ProgramTechnique
    runtimes: tuple[str, ...]
    """Engines that its program is worth running on."""
    needs_data: bool
    source: str
    """Paper or documentation it follows."""
    torch_precision: str | None = None
    """What the torch engines do instead of running the program, if they can: see `runtimes/torch_eager.py`."""
    extra: str | None = None
    """Optional dependency group it needs."""


_registered: dict[type[Params], Technique] = {}


def technique(
    params: type[Params],
    *,
    runtimes: tuple[str, ...],
    needs_data: bool,
    source: str,
    torch_precision: str | None = None,
    extra: str | None = None,
) -> Callable[[ProgramTechnique], ProgramTechnique]:
    """Register a function as the technique of a params class."""

    def register(apply: ProgramTechnique) -> ProgramTechnique:
        if params in _registered:
            raise ValueError(f"{params.__name__} has a technique already: {_registered[params].apply.__module__}")
        _registered[params] = Technique(params, apply, runtimes, needs_data, source, torch_precision, extra)
        return apply

    return register


def all_techniques() -> dict[type[Params], Technique]:
    """Every registered technique by its params class."""
    for package in pkgutil.iter_modules(techniques.__path__):
        if package.ispkg:
            folder = importlib.import_module(f"{techniques.__name__}.{package.name}")
            for module in pkgutil.iter_modules(folder.__path__):
                importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(_registered)


def technique_of(params: Params) -> Technique:
    """The technique that a request's params name."""
    return all_techniques()[type(params)]
