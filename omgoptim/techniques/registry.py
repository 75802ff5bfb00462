"""The registry of techniques: frozen records, one per params class, filled by the `@technique` decorator.

Files under `techniques/<verb>/` are found by a flat listing; what those files share lives in private packages beside
them (`techniques/quantize/_onnx/`) and registers nothing. Nothing is swallowed: a file that does not import, or a
params class with two techniques, is an error.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from omgoptim import techniques
from omgoptim.models.samples import Samples, forward_args
from omgoptim.reports import Change, Skip
from omgoptim.reports.measured import SkipReason
from omgoptim.requests import Params
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a technique: changed layers, and skipped ones with the reason."""

    changed: list[Change]
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the summary of a report."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Reason for leaving a layer unchanged."""

    reason: str
    kind: SkipReason

    def skip(self, path: str) -> Skip:
        """Return the skip of a layer for this reason."""
        return Skip(path=path, reason=self.reason, kind=self.kind)


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """Context of a technique on programs, besides its parameters."""

    calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]]
    """Calibration batches: input name to array, batch first. Empty without data."""
    scratch: Path
    """An existing folder for temporary files."""
    seed: int = 0
    threads: int = 1
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None
    """`progress(stage, fraction of that stage, or None)`."""
    cache: Path | None = None
    """Folder for results that a program with more layers in float takes; None: no cache."""


ProgramTechnique = Callable[[Path, Path, Any, ProgramRun], Outcome]
"""`apply(source, target, params, run)`: reads the ONNX file `source`, writes the ONNX file `target`."""


@dataclass(frozen=True, slots=True)
class ModuleRun:
    """Context of a technique on modules, besides its parameters."""

    signature: Signature
    """Inputs of the module's forward."""
    statistics: Samples
    """Batches of the train split (random ones without data) for norms, moments and gradients."""
    loss: Callable[[Any, Any], Tensor]
    """`loss(outputs, target)`: a scalar whose gradient gives the importance of weights; the target may be None."""
    original: nn.Module
    """The module before the first round, in eval mode: widths and amounts are fractions of it. Not changed."""
    scratch: Path
    """An existing folder for temporary files."""
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    """Device of the module, the original and the batches."""
    real: bool = True
    """True if the statistics are real data; nothing is fitted to random inputs."""
    runtime: str = "torch_eager"
    """The engine that the artifact will run on."""
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None
    """`progress(stage, fraction of this technique's work)`."""
    measuring: Callable[[], AbstractContextManager[None]] = nullcontext
    """`with measuring():` locks the device while something is timed."""

    def calls(self) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor], Any]]:
        """Yield the forward's arguments and the target of every batch of the statistics, on the run's device."""
        for batch, target in zip(self.statistics.batches, self.statistics.targets, strict=True):
            yield *forward_args(self.signature, batch, self.device), target


ModuleTechnique = Callable[["nn.Module", Any, ModuleRun], Outcome]
"""`apply(module, params, run)`: changes the module, which is a copy of the user's, thrown away if this raises."""


@dataclass(frozen=True, slots=True)
class Technique:
    """A registered technique and its requirements."""

    params: type[Params]
    apply: ProgramTechnique | ModuleTechnique
    on: Literal["program", "module"]
    """Kind of model it changes: see `ProgramTechnique` and `ModuleTechnique`."""
    runtimes: tuple[str, ...]
    """Engines that its result is worth running on."""
    needs_data: bool
    source: str
    """Paper or documentation it follows."""
    torch_precision: str | None = None
    """Mode in which the torch engines run the module instead of the program, if they can: see
    `runtimes/torch_engines.py`.
    """


_registered: dict[type[Params], Technique] = {}


def technique(
    params: type[Params],
    *,
    runtimes: tuple[str, ...],
    needs_data: bool,
    source: str,
    torch_precision: str | None = None,
) -> Callable[[ProgramTechnique], ProgramTechnique]:
    """Register a function on programs as the technique of a params class."""

    def register(apply: ProgramTechnique) -> ProgramTechnique:
        _register(Technique(params, apply, "program", runtimes, needs_data, source, torch_precision))
        return apply

    return register


def module_technique(
    params: type[Params], *, needs_data: bool, source: str
) -> Callable[[ModuleTechnique], ModuleTechnique]:
    """Register a function on modules as the technique of a params class; its result runs on every engine."""

    def register(apply: ModuleTechnique) -> ModuleTechnique:
        _register(Technique(params, apply, "module", tuple(ENGINES), needs_data, source))
        return apply

    return register


def _register(record: Technique) -> None:
    if record.params in _registered:
        known = _registered[record.params].apply.__module__
        raise ValueError(f"{record.params.__name__} has a technique already: {known}")
    _registered[record.params] = record


def all_techniques() -> dict[type[Params], Technique]:
    """Return every registered technique by its params class."""
    for package in pkgutil.iter_modules(techniques.__path__):
        if package.ispkg and not package.name.startswith("_"):
            folder = importlib.import_module(f"{techniques.__name__}.{package.name}")
            for module in pkgutil.iter_modules(folder.__path__):
                if module.name.startswith("_"):
                    continue
                importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(_registered)


def technique_of(params: Params) -> Technique:
    """Return the technique of a request's params."""
    return all_techniques()[type(params)]


def apply_to_program(source: Path, target: Path, params: Params, run: ProgramRun) -> Outcome:
    """Apply the technique that `params` name to an ONNX file."""
    return cast(ProgramTechnique, technique_of(params).apply)(source, target, params, run)


def apply_to_module(module: nn.Module, params: Params, run: ModuleRun) -> Outcome:
    """Apply the technique that `params` name to a module, which is changed."""
    return cast(ModuleTechnique, technique_of(params).apply)(module, params, run)
