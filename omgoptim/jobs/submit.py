"""Start of a run: its folder, and a worker process that outlives its caller."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.errors import SetupError
from omgoptim.jobs.folder import RunFolder, Submission, WorkerProcess, new_run, runs_root
from omgoptim.jobs.interpreter import Interpreter, find_interpreter, require, worker_environment
from omgoptim.jobs.preflight import check_references
from omgoptim.jobs.processes import MARK, start_time_of
from omgoptim.jobs.states import as_failed
from omgoptim.jobs.storage import cannot_write, now
from omgoptim.reports import RunState
from omgoptim.requests import Request

WORKER = IMPORT_OMGOPTIM + "from omgoptim.jobs.worker import main\nmain(sys.argv[2])\n"


def submit(verb: str, request: Request, project: Path) -> RunFolder:
    """Start a run and return at once.

    Raises:
        OmgoptimError: something that the request names is not there: see `preflight`.
        SetupError: no Python was found that can do the work; nothing is left behind.
    """
    check_references(request, project)
    interpreter = find_interpreter(project, getattr(request, "python", None))
    require(interpreter)
    return launch(verb, request, project, interpreter)


def launch(verb: str, request: Request, project: Path, interpreter: Interpreter, program: str = WORKER) -> RunFolder:
    """Start a run in a checked Python interpreter.

    Raises:
        SetupError: the operating system refuses to start the process; the run's state says so.
    """
    folder = open_run(verb, request, project, interpreter)
    start_worker(folder, str(interpreter.path), project, program)
    return folder


def start_worker(folder: RunFolder, python: str, project: Path, program: str = WORKER) -> None:
    """Start the worker of a run folder whose state is `starting`.

    Raises:
        SetupError: the operating system refuses to start the process; the run's state says so.
    """
    try:
        worker = _spawn(python, program, folder, project)
    except OSError as error:
        failure = SetupError("the worker could not be started", f"{python}: {error}", "see `omgoptim doctor`")
        folder.write_state(as_failed(folder.stored_state(), failure))
        raise failure from None
    born = start_time_of(worker.pid)
    if born is not None and not folder.worker_file.exists():
        folder.write_worker(WorkerProcess(worker.pid, born))
    threading.Thread(target=worker.wait, name=f"reap {folder.id}", daemon=True).start()


def open_run(verb: str, request: Request, project: Path, interpreter: Interpreter) -> RunFolder:
    """Return the folder of a new run: its request written, its state `starting`.

    Raises:
        SetupError: nothing can be written in the project; nothing is left behind.
    """
    folder = None
    try:
        folder = new_run(project, verb)
        write_first(folder, verb, request, project, interpreter)
    except OSError as error:
        if folder is not None:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise cannot_write(runs_root(project), error) from None
    return folder


def write_first(folder: RunFolder, verb: str, request: Request, project: Path, interpreter: Interpreter) -> None:
    """Write the request and the first state of a run."""
    arguments: dict[str, Any] = request.model_dump(mode="json")
    python = str(interpreter.path)
    folder.write_request(Submission(verb, arguments, project, python, interpreter.found_by, interpreter.version))
    time = now()
    state = RunState(
        run_id=folder.id,
        verb=verb,
        status="starting",
        stage="starting the worker",
        started=time,
        updated=time,
        folder=str(folder.path),
        model=arguments.get("model") or f"{arguments.get('a')} and {arguments.get('b')}",
    )
    folder.write_state(state)


def _spawn(python: str, program: str, folder: RunFolder, project: Path) -> subprocess.Popen[bytes]:
    """Start the worker in a session of its own, without terminal, pipes or signals from this process."""
    environment = worker_environment() | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # what user code prints must not fail to print
        "OMGOPTIM_PROJECT": str(project),
        MARK: str(folder.path),
    }
    command = [python, "-c", program, str(PACKAGE_FILE), str(folder.path)]
    with folder.log_file.open("ab") as log:
        if sys.platform == "win32":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=project, env=environment,
                creationflags=flags,
            )  # fmt: skip
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=project, env=environment,
            start_new_session=True,
        )  # fmt: skip
