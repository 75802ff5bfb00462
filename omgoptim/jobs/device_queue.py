"""Queue of a device: one run at a time measures on it, in the order of their requests.

Two runs that time each other are both wrong. Loading, exporting, calibrating and training need no turn; while another
run measures they pause at their next progress report, because a busy machine would spoil its times.

Whoever holds the file lock measures. A ticket, a small file named by the time of asking, gives the order: only the
oldest ticket whose process is alive may take the lock.
"""

from __future__ import annotations

import getpass
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from omgoptim.errors import SetupError
from omgoptim.jobs.folder import WorkerProcess
from omgoptim.jobs.processes import is_alive, this_process
from omgoptim.jobs.storage import remove, write_atomically
from omgoptim.requests import Request

FOLDER_VARIABLE = "OMGOPTIM_LOCK_DIR"
"""Environment variable: the folder of the queues, in place of the machine's own."""

POLL_S = 0.25
"""Seconds between two looks at the queue. Chosen: short against the seconds of a measurement."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A run that measures or waits for its turn."""

    run_id: str
    pid: int
    born: float
    since: float
    """Seconds since the epoch: of the begin of its turn, or of its wait."""

    @property
    def process(self) -> WorkerProcess:
        """The process that waits."""
        return WorkerProcess(self.pid, self.born)


@dataclass(frozen=True, slots=True)
class Wait:
    """State of a run that waits for its turn: the run that measures, and how many are ahead."""

    measuring: Ticket | None
    """The run that measures now; None between two turns."""
    ahead: int
    """Earlier runs that wait too."""

    def text(self, device: str) -> str:
        """Return `waiting for cpu: run prune-… has been measuring for 12 s, 1 more is ahead`."""
        who = "the next run is about to measure"
        if self.measuring is not None:
            seconds = max(0.0, time.time() - self.measuring.since)
            who = f"run {self.measuring.run_id} has been measuring for {seconds:.0f} s"
        more = f", {self.ahead} more {'is' if self.ahead == 1 else 'are'} ahead" if self.ahead else ""
        return f"waiting for {device}: {who}{more}"


class DeviceQueue:
    """Queue of a device, from the side of one run.

    Args:
        device: cpu or cuda.
        run_id: who asks; shown to the runs that wait.
        folder: where the queues are; default: one folder of this user on this machine.
    """

    _numbers = itertools.count()

    def __init__(self, device: str, run_id: str, folder: Path | None = None) -> None:
        self.device = device
        self._run_id = run_id
        self._folder = folder or queue_folder()
        self._turn_file = self._folder / f"{device}.measuring.json"
        self._lock = FileLock(self._folder / f"{device}.lock")
        self._depth = 0

    @contextmanager
    def turn(self, on_wait: Callable[[Wait], None]) -> Iterator[None]:
        """Hold the device exclusively; nested calls share one turn.

        Args:
            on_wait: called again and again while others are ahead.
        """
        if not self._depth:
            self._acquire(on_wait)
        self._depth += 1
        owner = os.getpid()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and os.getpid() == owner:  # a forked child inherits the turn and must not end it
                remove(self._turn_file)
                self._lock.release()

    def measured_by(self) -> Ticket | None:
        """Return the other run that measures on the device now; None if none does, or this one."""
        ticket = _read(self._turn_file)
        if self._depth or ticket is None or not is_alive(ticket.process):
            return None
        return ticket

    def pause(self, on_wait: Callable[[Wait], None]) -> bool:
        """Wait until no other run measures on the device; return whether one did."""
        paused = False
        while (other := self.measured_by()) is not None:
            on_wait(Wait(other, 0))
            paused = True
            time.sleep(POLL_S)
        return paused

    def _acquire(self, on_wait: Callable[[Wait], None]) -> None:
        ticket = self._folder / f"{self.device}.{time.time_ns():020d}-{os.getpid()}-{next(self._numbers)}.ticket"
        _write(ticket, self._ticket())
        try:
            while (ahead := self._ahead_of(ticket)) or not self._take():
                on_wait(Wait(self.measured_by(), ahead))
                time.sleep(POLL_S)
            _write(self._turn_file, self._ticket())
        finally:
            remove(ticket)

    def _take(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def _ahead_of(self, own: Path) -> int:
        """Living runs with an older ticket; tickets of dead ones are removed."""
        ahead = 0
        for path in self._folder.glob(f"{self.device}.*.ticket"):
            if path.name >= own.name:
                continue
            ticket = _read(path)
            if ticket is not None and is_alive(ticket.process):
                ahead += 1
            else:
                remove(path)
        return ahead

    def _ticket(self) -> Ticket:
        process = this_process()
        return Ticket(self._run_id, process.pid, process.born, time.time())


def device_of(request: Request) -> str | None:
    """Return the device that a request measures on; None if it measures nothing."""
    if getattr(request, "plan", False):
        return None
    return "cuda" if getattr(request, "device", "cpu") == "cuda" else "cpu"


def queue_folder() -> Path:
    """Return the folder of this user's queues on this machine, independent of TMPDIR.

    Raises:
        SetupError: it belongs to another user.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
    shared = Path("/tmp") if os.name == "posix" and os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
    named = os.environ.get(FOLDER_VARIABLE)
    folder = Path(named) if named else shared / f"omgoptim-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
        raise SetupError(f"{folder} belongs to another user", "runs take turns by files in it", "remove that folder")
    return folder


def _read(path: Path) -> Ticket | None:
    """Return the ticket in a file; None if there is none, or it has another format."""
    try:
        return Ticket(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, ticket: Ticket) -> None:
    write_atomically(path, json.dumps(asdict(ticket)))
