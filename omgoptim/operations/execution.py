"""Place of a run's work: checked before anything else, sent as JSON, stopped while something is timed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omgoptim.errors import RequestError, argument
from omgoptim.executors import Executor
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import Live
from omgoptim.requests import ModelRequest, Request, parse
from omgoptim.requests.training import ExecutionFields


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


def sent(verb: str, request: ModelRequest, context: RunContext, threads: int) -> dict[str, Any]:
    """Return a request as it is sent to workers, in JSON: see `request_here`.

    Args:
        verb: that is done.
        request: of the run.
        context: of the run.
        threads: of each worker, unless fewer were asked for.
    """
    asked = request.model_dump(mode="json") | {"on": "local", "workers": 1, "output": None}
    return {
        "verb": verb,
        "request": asked | {"threads": min(threads, request.threads or threads)},
        "project": str(context.project),
        "scratch": str(context.work),
        "run_id": context.run_id,
    }


def request_here(record: Mapping[str, Any]) -> tuple[Request, RunContext]:
    """Return a request that was sent, and a context of this worker process.

    Where the run's folder is not shared, the project is the copy in the working directory, and paths are those of it.
    """
    project, scratch = Path(record["project"]), Path(record["scratch"])
    text = json.dumps(record["request"])
    if not scratch.is_dir():
        text, project = text.replace(str(project), str(Path.cwd())), Path.cwd()
        scratch = Path(tempfile.mkdtemp(prefix="omgoptim-worker-"))
    folder = scratch / f"worker-{os.getpid()}"
    (folder / "work").mkdir(parents=True, exist_ok=True)
    context = RunContext(folder, record["run_id"], project, "", "", lambda _stage, _done: None)
    return parse(record["verb"], json.loads(text)), context
