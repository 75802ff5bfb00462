"""Steps of `optimize` that do not depend on each other, pruned or distilled and trained at the same time.

A task makes a step up to where it would be timed, and writes the checkpoints from which the step's own run goes on. So
any worker makes it, and the driver alone measures, one step after the other.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omgoptim.executors import Task, executor_on
from omgoptim.executors.task import Work
from omgoptim.hardware import usable_cores
from omgoptim.operations import operation_of
from omgoptim.operations.execution import parent_files, request_here, sent, with_parent
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.optimization.selection_data import selection_as_evaluation
from omgoptim.operations.optimization.steps import MADE, MADE_S, Steps
from omgoptim.requests import ModelRequest, parse

FUNCTION = f"{__name__}:make_step"


def make_together(steps: Steps, asked: Sequence[tuple[str, dict[str, Any]]], artifact: Path | None) -> None:
    """Make steps from the original on the workers of the request; `Steps.take` goes on with each, and measures it.

    One that fails here is made again by `Steps.take`, which records its error.

    Args:
        steps: of the run.
        asked: verb and arguments of each.
        artifact: that the original is, if it is one.

    Raises:
        SetupError: Ray does not start.
    """
    context, request = steps.context, steps.request
    place = context.checkpoints / MADE
    waiting = {}
    for verb, arguments in asked:
        key, whole = steps.named(verb, arguments)
        if steps.ledger.get(key) is None and not (place / key).is_dir():
            waiting[key] = verb, cast(ModelRequest, parse(verb, whole))
    if not waiting:
        return
    place.mkdir(parents=True, exist_ok=True)
    threads = 1 if request.on == "ray" else max(1, usable_cores() // request.workers)
    inputs = parent_files(artifact)
    with executor_on(request.on, request.workers, context.project, context.progress) as executor:
        assert executor is not None  # the caller asks only where there are workers
        context.progress(f"making {len(waiting)} steps on {request.workers} workers", None)
        futures = [
            executor.submit(Task(FUNCTION, sent(verb, step, context, threads), place / key, inputs=inputs))
            for key, (verb, step) in waiting.items()
        ]
        made = sum(future.exception() is None for future in futures)
        context.progress(f"{made} of {len(futures)} steps made by {request.workers} workers", None)


class _Made(Exception):
    """A step came to where it would be timed."""


def make_step(payload: Mapping[str, Any], work: Work) -> None:
    """Do a verb up to its first measurement of time; the task of a worker."""
    began, record = time.monotonic(), with_parent(payload, work.inputs)
    request, context = request_here(record)
    context = replace(context, folder=work.checkpoints, measuring=_ended)
    shutil.rmtree(context.work, ignore_errors=True)  # of a lost attempt, whose checkpoints stay
    context.work.mkdir(parents=True)
    with suppress(_Made):
        operation_of(record["verb"])(request, context, Live(resplit=selection_as_evaluation))
    for done in context.checkpoints.glob("*/done"):
        shutil.copytree(done, work.folder / done.relative_to(context.folder))
    (work.folder / MADE_S).write_text(str(time.monotonic() - began))


def _ended() -> AbstractContextManager[None]:
    raise _Made
