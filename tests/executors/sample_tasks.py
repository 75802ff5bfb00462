"""Tasks for tests; a worker imports this module by its name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omgoptim.errors import ModelError
from omgoptim.executors.task import Work


def square(payload: Mapping[str, Any], work: Work) -> None:
    """Write the square of a number, and log the start of each attempt."""
    _log(payload)
    (work.folder / "square").write_text(str(payload["number"] ** 2))


def waiting(payload: Mapping[str, Any], work: Work) -> None:
    """Square a number once a file exists."""
    _log(payload)
    deadline = time.monotonic() + 120
    while not Path(payload["until"]).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (work.folder / "square").write_text(str(payload["number"] ** 2))


def resuming(payload: Mapping[str, Any], work: Work) -> None:
    """Die after the first epoch of the first attempt, and go on from its checkpoint."""
    work.checkpoints.mkdir(exist_ok=True)
    done = work.checkpoints / "epoch"
    if not done.exists():
        done.write_text("1")
        os.kill(os.getpid(), signal.SIGKILL)
    (work.folder / "from").write_text(done.read_text())


def dying(payload: Mapping[str, Any], work: Work) -> None:
    _log(payload)
    os.kill(os.getpid(), signal.SIGKILL)


def refusing(payload: Mapping[str, Any], work: Work) -> None:
    _log(payload)
    raise ModelError("the network has no output", "its kernel is too large", "give a smaller one")


def copying(payload: Mapping[str, Any], work: Work) -> None:
    """Copy the inputs, and write whether a file of the driver is not seen."""
    for name, path in work.inputs.items():
        (work.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (work.folder / name).write_bytes(path.read_bytes())
    (work.folder / "absent").write_text(str(not Path(payload["absent"]).exists()))


def _log(payload: Mapping[str, Any]) -> None:
    with open(payload["log"], "a") as log:
        log.write(f"{payload['number']} {os.getpid()}\n")
