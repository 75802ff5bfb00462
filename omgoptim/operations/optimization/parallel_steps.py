"""Independent steps of `optimize`, pruned or distilled and trained in parallel.

A task runs a step until it would be timed, and writes the checkpoints from which the step's own run resumes. So any
worker can train it, and the driver alone measures, one step after the other.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omgoptim.executors import Task
from omgoptim.executors.task import Work
from omgoptim.operations import operation_of
from omgoptim.operations.execution import (
    from_payload,
    open_workers,
    parent_artifact_files,
    threads_per_worker,
    to_payload,
    with_parent_artifact,
)
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.optimization.selection_data import selection_as_evaluation
from omgoptim.operations.optimization.steps import PARALLEL, SECONDS_FILE, PlannedStep, Steps
from omgoptim.requests import ModelRequest, parse

FUNCTION = f"{__name__}:train_step"


def train_in_parallel(steps: Steps, planned: Sequence[PlannedStep], artifact: Path | None) -> None:
    """Train steps from the original on the workers of the request; `Steps.run` resumes each and measures it.

    A step that fails here is repeated by `Steps.run`, which records its error.

    Args:
        steps: of the run.
        planned: the steps, which start from the original.
        artifact: that the original is, if it is one.

    Raises:
        SetupError: Ray does not start.
    """
    context, request = steps.context, steps.request
    place = context.checkpoints / PARALLEL
    waiting = {}
    for step in planned:
        key, arguments = steps.key_and_arguments(step)
        if steps.ledger.get(key) is None and not (place / key).is_dir():
            waiting[key] = step.verb, cast(ModelRequest, parse(step.verb, arguments))
    if not waiting:
        return
    place.mkdir(parents=True, exist_ok=True)
    threads = threads_per_worker(request)
    inputs = parent_artifact_files(artifact)
    with open_workers(request, context) as executor:
        context.progress(f"training {len(waiting)} steps on {request.workers} workers", None)
        futures = [
            executor.submit(Task(FUNCTION, to_payload(verb, step, context, threads), place / key, inputs=inputs))
            for key, (verb, step) in waiting.items()
        ]
        trained = sum(future.exception() is None for future in futures)
        context.progress(f"{trained} of {len(futures)} steps trained by {request.workers} workers", None)


class _ReachedTiming(Exception):
    """Signal that a step would be timed next."""


def train_step(payload: Mapping[str, Any], work: Work) -> None:
    """Run a verb up to its first measurement of time: the task of a worker."""
    began, record = time.monotonic(), with_parent_artifact(payload, work.inputs)
    request, context = from_payload(record)
    context = replace(context, folder=work.checkpoints, measuring=_stop_before_timing)
    shutil.rmtree(context.work, ignore_errors=True)  # of a lost attempt, whose checkpoints stay
    context.work.mkdir(parents=True)
    with suppress(_ReachedTiming):
        operation_of(record["verb"])(request, context, Live(resplit=selection_as_evaluation))
    for done in context.checkpoints.glob("*/done"):
        shutil.copytree(done, work.folder / done.relative_to(context.folder))
    (work.folder / SECONDS_FILE).write_text(str(time.monotonic() - began))


def _stop_before_timing() -> AbstractContextManager[None]:
    raise _ReachedTiming
