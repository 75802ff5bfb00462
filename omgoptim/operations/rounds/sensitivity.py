"""Sensitivity analysis: quality drop when one layer or group alone is compressed."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.executors import Task, executor_on
from omgoptim.executors.task import Work
from omgoptim.operations.compression_job import applied, open_job
from omgoptim.operations.execution import (
    is_parallel,
    parent_files,
    refuse_other_weights,
    request_here,
    sent,
    threads_each,
    weights_hash,
    with_parent,
)
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.rounds.loop import RoundsJob
from omgoptim.operations.save_module import require_module
from omgoptim.reports import SensitivityPoint
from omgoptim.requests import FactorizeRequest, Params, PruneRequest, verb_of
from omgoptim.requests.factorize import Factorization, Whitened
from omgoptim.requests.prune import SemiStructured, Structured
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.registry import ModuleRun
from omgoptim.training.batch_norm import reestimate
from omgoptim.training.modes import on_device

AMOUNTS = (0.25, 0.5, 0.75)
"""Compression amounts per layer or group: enough points for a curve, each one evaluation of the model."""

FEW = 64
"""Samples for the moments of each of many factorizations; fewer than for the run's own, since each layer is factorized
three times."""

FUNCTION, QUALITIES = f"{__name__}:measure_path", "qualities.json"

SPAN = (0.09, 0.12)
"""Fractions of the run's progress at which the analysis starts and ends."""


def layer_sensitivity(job: RoundsJob, params: Params) -> list[SensitivityPoint]:
    """Measure quality with one layer or group compressed by each of `AMOUNTS`, batch-norm statistics re-estimated.

    Raises:
        TechniqueError: nothing in the model can be compressed by this technique.
    """
    if isinstance(params, SemiStructured):
        raise TechniqueError(
            "sensitivity needs an amount, and a pattern has none",
            f"{params.pattern} is the same for every layer",
            "leave sensitivity out",
        )
    paths = _paths(job, params)
    points: list[SensitivityPoint] = []
    with _measured(job, params, paths) as measured:
        for index, path in enumerate(paths):
            start, end = SPAN
            done = start + (end - start) * index / len(paths)
            job.context.progress(f"sensitivity of {path}, {index + 1} of {len(paths)}", done)
            for amount, quality in zip(AMOUNTS, measured(index), strict=True):
                if quality is not None and math.isfinite(quality):
                    point = SensitivityPoint(path=path, amount=amount, quality=quality, quality_drop=job.drop(quality))
                    points.append(point)
    return points


@contextmanager
def _measured(
    job: RoundsJob, params: Params, paths: Sequence[str]
) -> Iterator[Callable[[int], Sequence[float | None]]]:
    """Yield a function that returns the quality of each of `AMOUNTS` of a path, measured here or by workers."""
    request, context = job.request, job.context
    if not is_parallel(request):
        yield lambda index: qualities(job, params, paths[index])
        return
    place = context.checkpoints / "sensitivity"
    place.mkdir(parents=True, exist_ok=True)
    problem = sent(verb_of(request), request, context, threads_each(request)) | {"identity": weights_hash(job.original)}
    inputs = parent_files(job.loaded.source.artifact)
    with executor_on(request.on, request.workers, context.project, context.progress) as executor:
        assert executor is not None  # there are workers
        futures = []
        for path in paths:
            payload = {"problem": problem, "path": path}
            key = hashlib.sha256(json.dumps(payload).encode()).hexdigest()[:16]  # a resumed run finds it again
            futures.append(executor.submit(Task(FUNCTION, payload, place / key, inputs=inputs)))
        yield lambda index: json.loads((futures[index].result().folder / QUALITIES).read_text(encoding="utf-8"))


def measure_path(payload: Mapping[str, Any], work: Work) -> None:
    """Measure the quality with one path compressed by each of `AMOUNTS`: the task of a worker."""
    job = _loaded(json.dumps(with_parent(payload["problem"], work.inputs), sort_keys=True))
    found = qualities(job, job.request.method, payload["path"])
    (work.folder / QUALITIES).write_text(json.dumps(found), encoding="utf-8")


@cache
def _loaded(record: str) -> RoundsJob:
    """Load model and data of a run that was sent, once in a worker process.

    Raises:
        RunError: the model has other weights here than in the driver.
    """
    asked = json.loads(record)
    request, context = request_here(asked)
    assert isinstance(request, PruneRequest | FactorizeRequest)

    def refuse(loaded: LoadedModel) -> None:
        refuse_other_weights(require_module(loaded, asked["verb"]), asked["identity"], request.model)

    return open_job(request, context, None, refuse)


def _paths(job: RoundsJob, params: Params) -> list[str]:
    """Return the groups, or the layers that the technique changes on a copy."""
    if isinstance(params, Structured):
        return [
            group.name for group in find_groups(on_device(job.original, job.loaded.device), params, _run(job)).groups
        ]
    outcome = applied(job, copy.deepcopy(job.original), _everywhere(params), _run(job))
    return list(dict.fromkeys(change.path for change in outcome.changed))


def _run(job: RoundsJob) -> ModuleRun:
    """Return a module run without progress, since the technique runs on many copies."""
    return replace(job.module_run(SPAN), progress=lambda _stage, _done: None)


def _everywhere(params: Params) -> Params:
    changes = _rank_only(AMOUNTS[1]) if isinstance(params, Factorization) else {"sparsity": AMOUNTS[1]}
    return params.model_copy(update=changes)


def _alone(params: Params, path: str, amount: float) -> Params:
    """Restrict the technique to one path and amount."""
    changes: dict[str, Any] = {"targets": [path]}
    if isinstance(params, Structured):
        return params.model_copy(update=changes | _ratio_only(amount))
    if isinstance(params, Factorization):
        few = {"calibration_samples": FEW} if isinstance(params, Whitened) else {}
        return params.model_copy(update=changes | _rank_only(amount) | few)
    return params.model_copy(update=changes | {"sparsity": amount, "reconstruct": False})


def _ratio_only(amount: float) -> dict[str, Any]:
    goals = {"target_speedup": None, "target_latency_ms": None, "target_macs_ratio": None}
    return {**goals, "pruning_ratio": amount, "ranking": "uniform", "reconstruct": False}


def _rank_only(amount: float) -> dict[str, Any]:
    return {"target_compression": None, "energy": None, "rank": None, "rank_ratio": 1 - amount, "per": "bytes"}


def qualities(job: RoundsJob, params: Params, path: str) -> list[float | None]:
    """Measure the quality with one path compressed by each of `AMOUNTS`; None where it cannot be."""
    return [_quality(job, _alone(params, path, amount)) for amount in AMOUNTS]


def _quality(job: RoundsJob, params: Params) -> float | None:
    """Measure the quality; None where this layer alone cannot be compressed by the amount."""
    module: nn.Module = copy.deepcopy(job.original)
    try:
        applied(job, module, params, _run(job))
    except OmgoptimError:
        return None
    if job.loaded.data.real:
        reestimate(module, job.loaded.signature, job.datasets.statistics)
    return job.datasets.evaluator.score(module)
