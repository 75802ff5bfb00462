"""Tasks in processes of this machine, each with as many of its cores as its share."""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.errors import OmgoptimError
from omgoptim.executors import RETRIES, Task, TaskResult, lost_worker_error
from omgoptim.executors.task import to_record

START = IMPORT_OMGOPTIM + "from omgoptim.executors.task import main\nmain()\n"


class LocalExecutor:
    """Worker processes, started when they are first needed; a lost one is started again."""

    def __init__(self, workers: int, project: Path, retries: int = RETRIES) -> None:
        self.workers = workers
        self._retries = retries
        self._project = project
        self._waiting: queue.Queue[tuple[Task, Future[TaskResult]] | None] = queue.Queue()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._closed = False
        self._starting = threading.RLock()
        self._mark = f".shared-{secrets.token_hex(8)}"
        self._marked: set[Path] = set()
        self._threads = [threading.Thread(target=self._serve, args=(place,), daemon=True) for place in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> Future[TaskResult]:
        """See `Executor.submit`."""
        (task.target.parent / self._mark).touch()
        self._marked.add(task.target.parent)
        future: Future[TaskResult] = Future()
        self._waiting.put((task, future))
        return future

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See `Executor.paused`."""
        with self._starting, processes_stopped([process.pid for process in self._processes.values()]):
            yield

    def close(self) -> None:
        """See `Executor.close`."""
        self._closed = True
        for _ in self._threads:
            self._waiting.put(None)
        for process in list(self._processes.values()):
            process.kill()
        for thread in self._threads:
            thread.join()
        for folder in self._marked:
            (folder / self._mark).unlink(missing_ok=True)

    def _serve(self, place: int) -> None:
        while (waiting := self._waiting.get()) is not None and not self._closed:
            task, future = waiting
            future.set_running_or_notify_cancel()
            try:
                future.set_result(self._run(task, place))
            except OmgoptimError as error:
                future.set_exception(error)
        process = self._processes.pop(place, None)
        if process is not None:
            _end(process)

    def _run(self, task: Task, place: int) -> TaskResult:
        reason = ""
        for _attempt in range(1 + self._retries):
            process = self._process(place)
            outcome = self._ask(process, json.dumps(to_record(task, self._mark)))
            if outcome is not None:
                return task_result(task, outcome)
            code = process.returncode
            reason = f"it ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
            if self._closed:
                break
        raise lost_worker_error(task, 1 + self._retries, reason)

    def _process(self, place: int) -> subprocess.Popen[str]:
        with self._starting:  # none while something is timed
            process = self._processes.get(place)
            if process is None or process.poll() is not None:
                threads = str(max(1, (os.cpu_count() or 1) // self.workers))
                process = subprocess.Popen(
                    [sys.executable, "-c", START, str(PACKAGE_FILE)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=self._project,
                    env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                )
                self._processes[place] = process
            return process

    def _ask(self, process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
        """Return the answer of a worker process; None where it ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer.endswith("\n"):
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)  # its own end says why
            _end(process)
            return None
        found: dict[str, Any] = json.loads(answer)
        return found


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def task_result(task: Task, outcome: dict[str, Any]) -> TaskResult:
    """Return the result of a finished attempt.

    Raises:
        OmgoptimError: what the task raised.
    """
    if "error" in outcome:
        raise OmgoptimError.from_dict(outcome["error"])
    received = sum(len(data) for data in outcome["files"].values()) if outcome["files"] else 0
    return TaskResult(task.target, outcome["host"], outcome["pid"], outcome["attempt"], outcome["seconds"], received)


@contextmanager
def processes_stopped(pids: list[int]) -> Iterator[None]:
    """Stop processes while the context is open; only where the kernel ends a stopped one with its parent (Linux)."""
    held = []
    for pid in pids if sys.platform == "linux" else []:
        with suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
            held.append(pid)
    try:
        yield
    finally:
        for pid in held:
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)
