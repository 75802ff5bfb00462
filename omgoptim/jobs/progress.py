"""Progress of a run, written to its folder by the worker."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from omgoptim.jobs.folder import RunFolder, now
from omgoptim.jobs.logs import trim
from omgoptim.jobs.remaining_time import RemainingTime, learn_shares, read_shares, shares_file
from omgoptim.reports import Candidate, Epoch, RunState, Step
from omgoptim.text import clean

HEARTBEAT_S = 5.0
SHORTEST_STEP_S = 0.2
"""A state that only moved its fraction is written at most this often."""
MOST_PUBLISHED = 2_000
"""Most records that a run shows while it goes on."""


class Progress:
    """The state of a running run and the thread that keeps it fresh; the worker's only writer of `state.json`.

    Its lock is reentrant, since a signal handler runs in the middle of whatever the main thread does.
    """

    def __init__(self, folder: RunFolder, state: RunState) -> None:
        self._folder = folder
        self._state = state
        self._events = os.open(folder.events_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)  # never inherited
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._written = time.monotonic()
        self._remaining = RemainingTime(self._written)
        self._kind = ""
        self._stale = False
        self._published = 0
        self._waiting_since: float | None = None
        self._waited_at_stage = ""
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Progress:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._heart.join()
        os.close(self._events)

    def start(self, stage: str, kind: str = "") -> None:
        """Begin to run: starts the clock that the eta follows from.

        Args:
            stage: that it begins with.
            kind: of run, such as `quantize auto`: earlier runs of it say how its time is shared between its stages.
        """
        with self._lock:
            self._kind = kind
            self._remaining = RemainingTime(time.monotonic(), read_shares(shares_file(), kind))
            self._set({"status": "running", "stage": stage}, write=True)

    def wait(self, stage: str) -> None:
        """Queue behind another run; called again while it lasts. The eta's clock stands still."""
        with self._lock:
            entering = self._waiting_since is None
            if entering:
                self._waiting_since, self._waited_at_stage = time.monotonic(), self._state.stage
            quiet = time.monotonic() - self._written >= HEARTBEAT_S
            self._set({"status": "queued", "stage": clean(stage, 200)}, write=entering or quiet)

    def go_on(self) -> None:
        """Run again after `wait`; nothing where it did not wait."""
        with self._lock:
            if self._waiting_since is None:
                return
            self._remaining.postpone(time.monotonic() - self._waiting_since)
            self._waiting_since = None
            self._set({"status": "running", "stage": self._waited_at_stage}, write=True)

    def report(self, stage: str, fraction: float | None) -> None:
        """What is being done now, and the fraction of the run that is done; None leaves the fraction as it was."""
        with self._lock:
            stage = clean(stage, 200)
            changes: dict[str, Any] = {"stage": stage}
            if fraction is not None and fraction == fraction:
                fraction = min(1.0, max(0.0, fraction))
                self._remaining.report(fraction, time.monotonic())
                changes["progress"] = round(self._remaining.share(fraction), 4)
            recent = time.monotonic() - self._written < SHORTEST_STEP_S
            self._set(changes, write=stage != self._state.stage or not recent)

    def publish(self, record: Candidate | Epoch | Step) -> None:
        """Write a part of the report that is known already, for those who watch the run."""
        event = {"t": now(), "kind": type(record).__name__.lower(), "record": record.model_dump(mode="json")}
        with self._lock, suppress(OSError):
            if not self._closed.is_set() and self._published < MOST_PUBLISHED:
                os.write(self._events, json.dumps(event).encode() + b"\n")
                self._published += 1

    def learn(self) -> None:
        """Leave to later runs of this kind how the time of this one was shared."""
        shares = self._remaining.finished(time.monotonic())
        if shares is not None and self._kind:
            learn_shares(shares_file(), self._kind, shares)

    def end(self, ended: RunState) -> None:
        """Write how the run ended; nothing is written after it."""
        with self._lock:
            self._closed.set()
            self._state = ended
            self._write()

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            self._closed.set()

    @property
    def state(self) -> RunState:
        """The state that was last set."""
        return self._state

    def _set(self, changes: dict[str, Any], write: bool) -> None:
        if self._closed.is_set():
            return
        self._state = self._state.model_copy(update=changes)
        self._stale = True
        if write:
            self._write()

    def _write(self) -> None:
        changes: dict[str, Any] = {"updated": now()}
        if self._state.status == "running":
            changes["eta_s"] = self._remaining.left(time.monotonic())
        self._state = self._state.model_copy(update=changes)
        event = {"t": self._state.updated, **self._state.model_dump(include={"status", "stage", "progress", "eta_s"})}
        with suppress(OSError):  # a full disk fails the run where it needs the disk, not where it says how far it is
            os.write(self._events, json.dumps(event).encode() + b"\n")
            self._folder.write_state(self._state)
        self._written, self._stale = time.monotonic(), False

    def _beat(self) -> None:
        while not self._closed.wait(1.0):
            with self._lock:
                quiet = time.monotonic() - self._written >= HEARTBEAT_S
                if not self._closed.is_set() and (self._stale or quiet):
                    self._write()
            if quiet:
                trim(self._folder.log_file)
