"""Tasks on Ray: a local Ray, or the cluster of RAY_ADDRESS.

Ray schedules, retries and transfers. A local Ray is authenticated by a random
token that only its own processes know, so that nothing is written to the home folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from omgoptim.bootstrap import PACKAGE_FILE
from omgoptim.errors import OmgoptimError, SetupError
from omgoptim.executors import RETRIES, Task, TaskResult, lost_worker_error
from omgoptim.executors.connection import cluster_address, pack, ray_library, reload_auth_settings, token_mode
from omgoptim.executors.local import processes_stopped, task_result
from omgoptim.executors.task import WORKER, run_task, to_record

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the driver of a job."""

SCRATCH = "omg-ray-"
"""Prefix of a local Ray's folder, which lies where paths are short: its sockets' names have at most 107 bytes."""

GUARD = """
import contextlib, os, psutil, shutil, sys
if not sys.stdin.read():  # the driver was killed; agents of Ray would stay
    token = os.environ["RAY_AUTH_TOKEN"]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("RAY_AUTH_TOKEN") == token:
                process.kill()
    shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
"""Process that ends the leftovers of a killed driver: all processes with the token of its Ray."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Size of the object store of a local Ray. Chosen: results are passed as files, and Ray takes 30 % of the memory by
default."""

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


class RayExecutor:
    """Ray tasks of one CPU each.

    Args:
        workers: CPUs of a local Ray; of a cluster, tasks beyond its CPUs wait.
        project: sent to a cluster; a local Ray reads it where it is.

    Raises:
        SetupError: Ray is not installed, does not start, or its address does not answer.
    """

    def __init__(self, workers: int, project: Path, progress: Callable[[str, float | None], None]) -> None:
        self.workers = workers
        self._ray = ray_library()
        _remove_abandoned()
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=_short_folder()))
        self._hold = self._scratch / "hold"
        self._authenticated = ExitStack()
        self._before: dict[str, str | None] = {}
        self._mark = f".shared-{secrets.token_hex(8)}"
        self._marked: set[Path] = set()
        self._running: dict[Path, int] = {}
        self._contents: dict[str, Any] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._ours = not self._ray.is_initialized()
        try:
            address = cluster_address()
            self._remote = address is not None
            if self._ours:
                self._start(address, project, progress)
        except BaseException:
            self.close()
            raise
        self._task = self._ray.remote(run_task)

    def submit(self, task: Task) -> Future[TaskResult]:
        """See `Executor.submit`."""
        (task.target.parent / self._mark).touch()
        self._marked.add(task.target.parent)
        options = self._task.options(num_cpus=1, max_retries=RETRIES)
        reference = options.remote(to_record(task, self._mark, self._hold), self._put(task.inputs))
        self._running[task.target] = 1
        future: Future[TaskResult] = Future()
        future.set_running_or_notify_cancel()

        def ended(found: Future[dict[str, Any]]) -> None:
            self._running.pop(task.target, None)
            try:
                future.set_result(self._received(task, found.result()))
            except OmgoptimError as error:
                future.set_exception(error)
            except Exception as error:  # noqa: BLE001 Ray's many kinds of a lost worker or node
                future.set_exception(
                    lost_worker_error(task, 1 + RETRIES, f"{type(error).__name__}: {str(error).splitlines()[0]}")
                )

        reference.future().add_done_callback(ended)
        return future

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See `Executor.paused`."""
        self._hold.touch()
        try:
            with processes_stopped(list(self._pids())):
                yield
        finally:
            self._hold.unlink(missing_ok=True)

    def close(self) -> None:
        """See `Executor.close`."""
        if self._ours:
            self._ray.shutdown()
        self._authenticated.close()
        if self._guard is not None:
            self._guard.communicate(b"done")
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self._ours:
            reload_auth_settings()
        for folder in self._marked:
            (folder / self._mark).unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self, address: str | None, project: Path, progress: Callable[[str, float | None], None]) -> None:
        self._set(QUIET)
        options: dict[str, Any] = {"logging_level": "error", "log_to_driver": True, "configure_logging": False}
        if address is None:
            progress("starting Ray on this machine", None)
            package_only = self._scratch / "path"  # omgoptim without the packages beside it
            package_only.mkdir()
            (package_only / "omgoptim").symlink_to(PACKAGE_FILE.parent, target_is_directory=True)
            path = [str(package_only), os.environ.get("PYTHONPATH", "")]
            self._set({"RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": os.pathsep.join(filter(None, path))})
            options |= {"address": "local", "num_cpus": self.workers}
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
            options |= {"_temp_dir": str(self._scratch)}
        elif JOB in os.environ:  # a Ray job's tasks have what the job was sent
            options |= {"address": address}
        else:
            package = pack(project, self._scratch / "project.zip")
            progress(f"sending the project to {address}: {package}", None)
            options |= {"address": address, "runtime_env": runtime_env(package.file)}
        if address is None:
            self._guard = subprocess.Popen([sys.executable, "-c", GUARD, str(self._scratch)], stdin=subprocess.PIPE)
        self._authenticated.enter_context(token_mode())
        try:
            self._ray.init(**options)
        except Exception as error:  # Ray raises kinds of its own, of versions, tokens, files and time-outs
            what = "Ray does not start" if address is None else f"no connection to the Ray cluster at {address}"
            raise SetupError(what, f"{type(error).__name__}: {str(error)[:300]}", "read the run's log") from error

    def _set(self, variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            self._before.setdefault(name, os.environ.get(name))
            os.environ[name] = value

    def _put(self, inputs: Mapping[str, Path]) -> Any:
        """Return input files for a cluster that may not see them, each content once in the object store."""
        if not self._remote or not inputs:
            return {}
        contents = {name: path.read_bytes() for name, path in inputs.items()}
        key = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in contents.values())).hexdigest()
        if key not in self._contents:
            self._contents[key] = self._ray.put(contents)
        return self._contents[key]

    def _received(self, task: Task, outcome: dict[str, Any]) -> TaskResult:
        """Write what came back from a worker that does not share the folder, and return how the task ran."""
        result = task_result(task, outcome)
        if not outcome["shared"]:
            folder = task.target.with_name(f"{task.target.name}.tmp-{secrets.token_hex(4)}")
            for name, data in outcome["files"].items():
                file = folder / name
                if not file.resolve().is_relative_to(folder.resolve()):
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            os.replace(folder, task.target)
        return result

    def _pids(self) -> Iterator[int]:
        """Yield the processes on this machine that run a task."""
        for target in list(self._running):
            for file in target.parent.glob(f"{target.name}.tmp-*/{WORKER}"):
                with suppress(OSError, ValueError):
                    about = json.loads(file.read_text(encoding="utf-8"))
                    if about["host"] == socket.gethostname() and about["pid"] != os.getpid():
                        yield int(about["pid"])


def _short_folder() -> Path:
    """Return /tmp where it can be written, else the folder for temporary files, whose name may be too long for Ray."""
    short = Path("/tmp")
    return short if os.access(short, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _remove_abandoned() -> None:
    """Remove the folders of drivers that were killed."""
    for folder in _short_folder().glob(f"{SCRATCH}*-*"):
        pid = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def runtime_env(project: Path) -> dict[str, Any]:
    """Return what a cluster needs to run tasks: the project's zip, and this omgoptim.

    The Python packages are the cluster's own: an image, or what its machines have installed.
    """
    return {
        "working_dir": str(project),
        "py_modules": [str(PACKAGE_FILE.parent)],
        "excludes": ["**/__pycache__/**"],
        "env_vars": {"RAY_USAGE_STATS_ENABLED": "0"},
    }
