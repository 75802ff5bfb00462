"""Queue of a device: one run at a time measures on it, in the order of their requests.

Two runs that time each other are both wrong. Loading, exporting, calibrating and training need no turn; while another
run measures they pause at their next progress report, because a busy machine would spoil its times.

Whoever holds the file lock measures. A ticket, a small file named by the time of asking, gives the order: only the
oldest ticket whose process is alive may take the lock. A run that pauses has a ticket too. It then works for a time
slice as long as its pause, and later runs measure after that: they cannot keep a training waiting for ever.
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
from dataclasses import asdict, dataclass, replace
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

MAX_TIME_SLICE_S = 60.0
"""Longest time slice of a run after a pause, in seconds. Chosen: a training gets half of a busy machine, and a run that
measures waits a minute at most."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A run that measures, waits for its turn, or works after a pause."""

    run_id: str
    pid: int
    born: float
    since: float
    """Seconds since the epoch: of the begin of its turn, or of its wait."""
    until: float | None = None
    """Seconds since the epoch: end of the time slice of a run after a pause; None for all others."""

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
    working: Ticket | None = None
    """An earlier run that works after a pause."""

    def text(self, device: str) -> str:
        """Return `waiting for cpu: run prune-… has been measuring for 12 s, 1 more is ahead`."""
        who = "the next run is about to measure"
        if self.measuring is not None:
            seconds = max(0.0, time.time() - self.measuring.since)
            who = f"run {self.measuring.run_id} has been measuring for {seconds:.0f} s"
        elif self.working is not None and self.working.until is not None:
            seconds = max(0.0, self.working.until - time.time())
            who = f"run {self.working.run_id}, which had to pause, goes on for {seconds:.0f} s"
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
        self._time_slice: Path | None = None  # the ticket of the last pause

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
        """Wait until no other run measures on the device; return whether one did.

        Then runs that asked after the pause began wait for as long as it lasted, at most `MAX_TIME_SLICE_S`.
        """
        if self.measured_by() is None:
            return False
        self._end_time_slice()
        began, ticket = time.time(), self._new_ticket()
        try:
            while self.measured_by() or self._ahead_of(ticket, working=False):
                on_wait(Wait(self.measured_by(), 0))
                time.sleep(POLL_S)
        except BaseException:
            remove(ticket)
            raise
        now = time.time()
        _write(ticket, replace(self._ticket(), until=now + min(now - began, MAX_TIME_SLICE_S)))
        self._time_slice = ticket
        return True

    def _acquire(self, on_wait: Callable[[Wait], None]) -> None:
        self._end_time_slice()
        ticket = self._new_ticket()
        try:
            while (ahead := self._ahead_of(ticket)) or not self._take():
                working = next((one for one in ahead if one.until is not None), None)
                on_wait(Wait(self.measured_by(), len(ahead) - (working is not None), working))
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

    def _ahead_of(self, own: Path, working: bool = True) -> list[Ticket]:
        """Return the older tickets that count, and remove those of dead processes and of time slices that are over.

        Args:
            own: file of the ticket that they are older than.
            working: whether runs that work after a pause count.
        """
        ahead = []
        for path in self._folder.glob(f"{self.device}.*.ticket"):
            if path.name >= own.name:
                continue
            ticket = _read(path)
            over = ticket is not None and ticket.until is not None and ticket.until <= time.time()
            if ticket is None or over or not is_alive(ticket.process):
                remove(path)
            elif working or ticket.until is None:
                ahead.append(ticket)
        return ahead

    def _new_ticket(self) -> Path:
        path = self._folder / f"{self.device}.{time.time_ns():020d}-{os.getpid()}-{next(self._numbers)}.ticket"
        _write(path, self._ticket())
        return path

    def _end_time_slice(self) -> None:
        if self._time_slice is not None:
            remove(self._time_slice)
            self._time_slice = None

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
