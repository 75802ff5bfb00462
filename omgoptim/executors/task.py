"""A task on the worker's side: its folder, its attempts, and the loop of a local worker process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.executors import Task

WORKER = "worker.json"
"""In the folder of an attempt: host, process and number of the attempt."""

PR_SET_PDEATHSIG = 1
"""Option of prctl(2): signal to send when the parent ends."""

HOLD_POLL_S = 0.05
"""Seconds between two looks at the hold file. Chosen: short against a timing launch."""


@dataclass(frozen=True, slots=True)
class Work:
    """Folders of an attempt."""

    folder: Path
    """Whatever is written here is the result."""
    checkpoints: Path
    """Found again by a later attempt, where the folder is shared; removed when the task is done."""
    inputs: Mapping[str, Path]


def to_record(task: Task, mark: str, hold: Path | None = None) -> dict[str, Any]:
    """Return a task in JSON.

    Args:
        task: to send.
        mark: name of a file beside the target: a worker that sees it shares the folder.
        hold: file that is there while no attempt may begin on the driver's machine.
    """
    return {
        "function": task.function,
        "payload": dict(task.payload),
        "target": str(task.target),
        "checkpoints": task.checkpoints or f"{task.target.name}.checkpoints",
        "inputs": {name: str(path) for name, path in task.inputs.items()},
        "mark": mark,
        "hold": None if hold is None else str(hold),
    }


def run_task(record: dict[str, Any], contents: Mapping[str, bytes]) -> dict[str, Any]:
    """Run an attempt of a task and return its outcome.

    That is `error`, or where and how long it ran, with its files unless the folder is shared.

    Args:
        record: of the task: see `to_record`.
        contents: of the task's input files, for a worker that cannot read them.
    """
    end_with_parent()
    target = Path(record["target"])
    shared = (target.parent / record["mark"]).is_file()
    root = target.parent if shared else Path(tempfile.mkdtemp(prefix="omgoptim-task-"))
    try:
        return _attempt(record, contents, root, shared)
    finally:
        if not shared:
            shutil.rmtree(root, ignore_errors=True)


def _attempt(record: dict[str, Any], contents: Mapping[str, bytes], root: Path, shared: bool) -> dict[str, Any]:
    target = root / Path(record["target"]).name
    began, (number, folder) = time.monotonic(), _begin(target)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "attempt": number}
    (folder / WORKER).write_text(json.dumps(about), encoding="utf-8")
    while record["hold"] and os.path.exists(record["hold"]):  # something is timed by a driver that saw no file above
        time.sleep(HOLD_POLL_S)
    work = Work(folder, root / record["checkpoints"], _inputs(record, contents, root))
    try:
        if not target.is_dir():  # else an earlier attempt was lost after its last step
            function_of(record["function"])(record["payload"], work)
    except OmgoptimError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return about | {"error": error.to_dict()}
    except Exception as error:  # noqa: BLE001 a bug of ours or of a library: it would fail on every attempt
        traceback.print_exc()
        shutil.rmtree(folder, ignore_errors=True)
        last = traceback.format_exception_only(type(error), error)[-1].strip()
        return about | {"error": OmgoptimError(f"omgoptim itself failed: {last}", f"in {target.name}").to_dict()}
    with contextlib.suppress(OSError):  # it is there already: another attempt came first
        os.replace(folder, target)
    for left in (work.checkpoints, *root.glob(f"{target.name}.tmp-*")):
        shutil.rmtree(left, ignore_errors=True)
    files = {} if shared else {str(file.relative_to(target)): file.read_bytes() for file in _files(target)}
    return about | {"seconds": time.monotonic() - began, "files": files, "shared": shared}


def function_of(name: str) -> Callable[[Mapping[str, Any], Work], None]:
    """Import the function of a task."""
    module, _, attribute = name.partition(":")
    function: Callable[[Mapping[str, Any], Work], None] = getattr(importlib.import_module(module), attribute)
    return function


def end_with_parent() -> None:
    """Let the kernel end this process with the one that started it, also while it is stopped (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _begin(target: Path) -> tuple[int, Path]:
    number = 1
    while True:
        folder = target.with_name(f"{target.name}.tmp-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return number, folder


def _inputs(record: dict[str, Any], contents: Mapping[str, bytes], root: Path) -> dict[str, Path]:
    found = {}
    for name, text in record["inputs"].items():
        path = Path(text)
        if name in contents and not path.is_file():
            path = root / "inputs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[name])
        found[name] = path
    return found


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def main() -> None:
    """Serve tasks, a JSON line each, until the input is closed; what the user's code prints goes to standard error."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the driver is gone

    threading.Thread(target=read, daemon=True).start()
    while True:
        outcome = run_task(json.loads(lines.get()), {})
        answers.write(json.dumps(outcome | {"files": []}) + "\n")
        answers.flush()
