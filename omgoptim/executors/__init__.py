"""Executors of independent tasks: processes of this machine, or a Ray cluster.

A task is a pure function of a JSON payload that writes a folder. It writes `NNN.tmp-ATTEMPT` and renames it to `NNN`,
so that a result appears atomically and once, however often its worker was lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omgoptim.errors import RunError

RETRIES = 2
"""Times that a task is begun again after its worker was lost; an error of the task itself is final. Chosen: a task that
kills its worker three times does it again."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task: function, arguments and folder."""

    function: str
    """`package.module:function`, called as `function(payload, work)`: see `omgoptim.executors.task.Work`."""
    payload: Mapping[str, Any]
    """Arguments, in JSON."""
    target: Path
    """Folder that appears when the task is done."""
    checkpoints: str = ""
    """Name of a folder beside `target` that a later attempt finds again; default: `NNN.checkpoints`."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Files that the task reads, by name: a path of names without `..`."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Record of a finished task; its results are in its folder."""

    folder: Path
    host: str
    pid: int
    attempt: int
    """1 unless a worker was lost."""
    seconds: float
    received_bytes: int = 0
    """Bytes returned through the executor: 0 where the folder is shared."""


class Executor(Protocol):
    """Runs tasks, several at a time."""

    workers: int

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task as soon as a worker is free.

        The future raises what the task raised, and a RunError where its worker was lost too often.
        """
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Pause the tasks on this machine while the context is open, for timing."""
        ...

    def close(self) -> None:
        """End everything that was started; unfinished tasks are lost."""
        ...


def lost_worker_error(task: Task, attempts: int, reason: str) -> RunError:
    """Return the error for a task whose worker was lost on every attempt."""
    return RunError(
        f"the worker of {task.target.name} was lost {attempts} times",
        reason,
        "read the run's log; often the machine has too little memory for so many workers",
    )
