"""Executors of independent tasks: processes of this machine, or a Ray cluster.

A task is a pure function of a JSON payload that writes a folder. It writes `NNN.tmp-ATTEMPT` and renames it to `NNN`,
so that a result is there whole or not at all, and once, however often its worker was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omgoptim.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRIES = 2
"""Times that a task is begun again after its worker was lost; an error of the task itself is final."""


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


@contextmanager
def executor_on(
    on: str, workers: int, project: Path, progress: Callable[[str, float | None], None]
) -> Iterator[Executor | None]:
    """Open the executor that a request names, and close it again; None where everything runs in this process.

    Args:
        on: local or ray.
        workers: tasks at a time.
        project: folder that workers load code and data from.
        progress: of the run: stage, and fraction or None.

    Raises:
        SetupError: Ray is not installed, does not start, or its address does not answer.
    """
    with ExitStack() as stack:
        opened: Executor | None = None
        if on == "ray":
            from omgoptim.executors.ray import RayExecutor

            opened = RayExecutor(workers, project, progress)
        elif workers > 1:
            from omgoptim.executors.local import LocalExecutor

            opened = LocalExecutor(workers, project)
        if opened is not None:
            stack.callback(opened.close)
        yield opened


def lost_worker_error(task: Task, attempts: int, reason: str) -> RunError:
    """Return the error for a task whose worker was lost on every attempt."""
    return RunError(
        f"the worker of {task.target.name} was lost {attempts} times",
        reason,
        "read the run's log; often the machine has too little memory for so many workers",
    )
