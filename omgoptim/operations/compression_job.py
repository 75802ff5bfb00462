"""Shared state of one compression run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from omgoptim.operations.baseline import at_exportable_batch
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import Datasets, load_datasets, scoring_loss
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.prepare import prepare
from omgoptim.operations.save_module import engine_for, require_module
from omgoptim.requests import DistillRequest, FactorizeRequest, Params, PruneRequest, SearchRequest, verb_of
from omgoptim.techniques.registry import ModuleRun, Outcome, apply_to_module
from omgoptim.training.modes import on_device

WORK = (0.12, 0.76)
"""Fractions of the run's progress for compression and training."""

Request = TypeVar("Request", bound=PruneRequest | FactorizeRequest | DistillRequest | SearchRequest, covariant=True)


@dataclass(frozen=True)
class Job(Generic[Request]):
    """A compression run: request, model and data."""

    request: Request
    context: RunContext
    loaded: LoadedModel
    datasets: Datasets
    original: nn.Module
    runtime: str
    rounds: int = 1

    def module_run(self, span: tuple[float, float] = WORK) -> ModuleRun:
        """Return the input of a technique, with progress within `span` of the run."""
        scratch = self.context.work / "technique"
        scratch.mkdir(parents=True, exist_ok=True)
        return ModuleRun(
            signature=self.loaded.signature,
            statistics=self.datasets.statistics,
            loss=scoring_loss(self.datasets.loss, self.loaded.outputs),
            original=on_device(self.original, self.loaded.device),
            scratch=scratch,
            seed=self.request.seed,
            threads=self.loaded.bench.threads,
            device=self.loaded.device,
            real=self.loaded.data.real,
            runtime=self.runtime,
            progress=self.context.part(*span),
            measuring=self.context.measuring_here or self.context.measuring,
        )

    def span(self, number: int, part: tuple[float, float]) -> tuple[float, float]:
        """Return the fractions of the run for a part (0..1) of round `number`."""
        start, end = WORK
        width = (end - start) / self.rounds
        return start + width * (number - 1 + part[0]), start + width * (number - 1 + part[1])

    def drop(self, quality: float) -> float:
        """Return the quality drop against the original on the selection samples."""
        return self.datasets.evaluator.original - quality


AnyJob = Job[PruneRequest | FactorizeRequest | DistillRequest]
Compression = TypeVar("Compression", bound=PruneRequest | FactorizeRequest | DistillRequest)


def open_job(
    request: Compression, context: RunContext, live: Live | None, refuse: Callable[[LoadedModel], None]
) -> Job[Compression]:
    """Load the model and the data of a run of prune, factorize or distill.

    Args:
        request: of the run.
        context: of the run.
        live: objects of the caller's process.
        refuse: raises for a model or data that the verb cannot use, before the training data is read.

    Raises:
        OmgoptimError: the model or its data cannot be loaded, or what `refuse` raises.
    """
    loaded = prepare(request, context, live)
    original = require_module(loaded, verb_of(request))
    runtime = engine_for(request.runtime, loaded)
    loaded = at_exportable_batch(runtime, loaded, context)
    refuse(loaded)
    context.progress("reading the training data", 0.08)
    return Job(request, context, loaded, load_datasets(request, loaded, original, live), original, runtime)


def applied(job: AnyJob, module: nn.Module, params: Params, run: ModuleRun) -> Outcome:
    """Apply a technique to a module on the run's device and move it back to the CPU."""
    try:
        return apply_to_module(module.to(job.loaded.device), params, run)
    finally:
        module.cpu()
