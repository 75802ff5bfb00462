"""Where a run's independent work may run: checked before anything else, and stopped while something is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from omgoptim.errors import RequestError, argument
from omgoptim.executors import Executor
from omgoptim.operations.context import RunContext
from omgoptim.operations.live_objects import Live
from omgoptim.requests.execution import ExecutionFields


def refuse_unreachable(request: ExecutionFields, live: Live | None) -> None:
    """Refuse what no worker can do, before any work.

    Raises:
        RequestError: objects of this process were given, which cannot be sent.
        SetupError: Ray is not installed, or its address does not answer.
    """
    if request.on == "local" and request.workers == 1:
        return
    given = [name for name in ("module", "data", "metric", "loss", "student", "space") if getattr(live, name, None)]
    if given:
        raise RequestError(
            f"a worker cannot have the caller's {given[0]}",
            "it is an object of this process, and workers load everything by its name",
            f"give it as file.py:callable, or leave out {argument('on', request.on)} and workers",
        )
    if request.on == "ray":
        from omgoptim.executors.connection import cluster_address, ray_library

        cluster_address()
        ray_library()


def pausing(context: RunContext, executor: Executor) -> RunContext:
    """Return the context with the tasks on this machine stopped while something is measured."""

    @contextmanager
    def measuring() -> Iterator[None]:
        with context.measuring(), executor.paused():
            yield

    return replace(context, measuring=measuring)
