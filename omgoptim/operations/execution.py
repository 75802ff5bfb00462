"""Execution of a run's work by workers: checks, requests as JSON, and pauses while something is timed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.errors import RequestError, RunError, argument
from omgoptim.executors import Executor
from omgoptim.hardware import usable_cores
from omgoptim.models.manifest import MANIFEST
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import Live
from omgoptim.requests import ModelRequest, Request, parse
from omgoptim.requests.training import ExecutionFields

PARENT = "parent/"
"""Prefix of a task's inputs: the files of the artifact that the model is."""

WORKER_VALUES = {"on": "local", "workers": 1, "output": None, "target": None}
"""Values that replace arguments of a request on a worker: it works alone, and neither delivers nor measures."""


def is_parallel(request: ExecutionFields) -> bool:
    """Return whether a request asks for workers."""
    return request.on != "local" or request.workers > 1


def threads_per_worker(request: ExecutionFields) -> int:
    """Return the threads of each worker: its share of this machine's cores, and one on Ray."""
    return 1 if request.on == "ray" else max(1, usable_cores() // request.workers)


def refuse_unsendable(request: ExecutionFields, live: Live | None) -> None:
    """Refuse a request that workers cannot execute, before any work.

    Raises:
        RequestError: it contains objects of this process, which cannot be sent.
        SetupError: Ray is not installed, or its address does not answer.
    """
    if not is_parallel(request):
        return
    live_objects = [
        name for name in ("module", "data", "metric", "loss", "student", "space") if getattr(live, name, None)
    ]
    if live_objects:
        raise RequestError(
            f"the Python object given as {live_objects[0]} cannot be sent to workers",
            "workers load model, data and functions by their names",
            f"give it as file.py:callable, or leave out {argument('on', request.on)} and workers",
        )
    if request.on == "ray":
        from omgoptim.executors.connection import cluster_address, ray_library

        cluster_address()
        ray_library()


@contextmanager
def open_workers(request: ExecutionFields, context: RunContext) -> Iterator[Executor]:
    """Open the executor that a request names, and close it again.

    Raises:
        SetupError: Ray is not installed, does not start, or its address does not answer.
    """
    executor: Executor
    if request.on == "ray":
        from omgoptim.executors.ray import RayExecutor

        executor = RayExecutor(request.workers, context.project, context.progress)
    else:
        from omgoptim.executors.local import LocalExecutor

        executor = LocalExecutor(request.workers, context.project)
    try:
        yield executor
    finally:
        executor.close()


def with_paused_tasks(context: RunContext, executor: Executor) -> RunContext:
    """Return the context with the tasks on this machine stopped while something is measured."""

    @contextmanager
    def measuring() -> Iterator[None]:
        with context.measuring(), executor.paused():
            yield

    return replace(context, measuring=measuring)


def to_payload(verb: str, request: ModelRequest, context: RunContext, threads: int) -> dict[str, Any]:
    """Return a request as it is sent to workers, in JSON: see `from_payload`.

    A worker uses `threads`, unless the request has fewer.
    """
    arguments = request.model_dump(mode="json")
    arguments |= {name: value for name, value in WORKER_VALUES.items() if name in arguments}
    return {
        "verb": verb,
        "request": arguments | {"threads": min(threads, request.threads or threads)},
        "project": str(context.project),
        "scratch": str(context.work),
        "run_id": context.run_id,
    }


def parent_artifact_files(artifact: Path | None) -> dict[str, Path]:
    """Return the files of the artifact that a run starts from, as inputs of a task; none where it is no artifact."""
    files = [] if artifact is None else sorted(file for file in artifact.rglob("*") if file.is_file())
    return {PARENT + file.relative_to(artifact or file).as_posix(): file for file in files}


def with_parent_artifact(record: Mapping[str, Any], inputs: Mapping[str, Path]) -> Mapping[str, Any]:
    """Return a request that was sent, with the artifact among a task's inputs as its model where the run's is not here.

    The driver has verified the artifact. It is stored in the copy of the project, by its hash.
    """
    files = {name.removeprefix(PARENT): path for name, path in inputs.items() if name.startswith(PARENT)}
    if not files or Path(record["scratch"]).is_dir():
        return record
    digest = hashlib.sha256(files[MANIFEST].read_bytes()).hexdigest()[:16]  # it has the hashes of all others
    folder = Path.cwd() / ".omgoptim" / "parents" / digest
    if not folder.is_dir():
        partial = folder.with_name(f"{digest}.{os.getpid()}")
        for name, path in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)
        with suppress(OSError):  # another worker of this machine came first
            os.replace(partial, folder)
        shutil.rmtree(partial, ignore_errors=True)
    return {**record, "request": record["request"] | {"model": str(folder), "trust_artifact": True}}


def from_payload(record: Mapping[str, Any]) -> tuple[Request, RunContext]:
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


def refuse_other_weights(module: nn.Module, identity: str, model: str) -> None:
    """Refuse a model that a worker loaded with other weights than the driver.

    `identity` is the hash of the driver's weights, empty without a model; `model` is its name in the request.

    Raises:
        RunError: the weights differ.
    """
    if identity and weights_hash(module) != identity:
        raise RunError(
            f"the weights of '{model}' differ between a worker and the driver",
            "all workers have to start from the same model",
            "let the model's function load its weights from a file of the project",
        )


def weights_hash(module: nn.Module) -> str:
    """Return a hash of a module's parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).float().numpy().tobytes())
    return found.hexdigest()
