"""Progress of a run, written to its folder by the worker, and the estimate of the remaining time.

A run reports fixed fractions at its stages; the share of its time at a fraction differs by verb, method and machine.
Each finished run stores its share of time at each fraction, and the next run of that kind converts its fractions by
their mean. Between two reports the estimate counts down; it never grows by itself.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.storage import now, trim_log, write_atomically
from omgoptim.reports import Candidate, Epoch, RunState, Step
from omgoptim.text import clean

HEARTBEAT_S = 5.0
"""Longest time between two writes of the state: clients get progress at least every 10 s."""

MIN_STEP_S = 0.2
"""A state that only moved its fraction is written at most this often. Chosen: five writes a second look continuous."""
MAX_PUBLISHED = 2_000
"""Most records that a run publishes while it runs. Chosen against a full disk."""


class Progress:
    """State of a running run, and the thread that refreshes it; the worker's only writer of `state.json`.

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
        """Mark the run as queued behind another one; the estimate of the remaining time pauses."""
        with self._lock:
            entering = self._waiting_since is None
            if entering:
                self._waiting_since, self._waited_at_stage = time.monotonic(), self._state.stage
            quiet = time.monotonic() - self._written >= HEARTBEAT_S
            self._set({"status": "queued", "stage": clean(stage, 200)}, write=entering or quiet)

    def end_wait(self) -> None:
        """Mark the run as running again after `wait`; without a wait, do nothing."""
        with self._lock:
            if self._waiting_since is None:
                return
            self._remaining.postpone(time.monotonic() - self._waiting_since)
            self._waiting_since = None
            self._set({"status": "running", "stage": self._waited_at_stage}, write=True)

    def report(self, stage: str, fraction: float | None) -> None:
        """Set the stage, and the fraction of the run that is done; None leaves the fraction unchanged."""
        with self._lock:
            stage = clean(stage, 200)
            changes: dict[str, Any] = {"stage": stage}
            if fraction is not None and fraction == fraction:
                fraction = min(1.0, max(0.0, fraction))
                self._remaining.report(fraction, time.monotonic())
                changes["progress"] = round(self._remaining.share(fraction), 4)
            recent = time.monotonic() - self._written < MIN_STEP_S
            self._set(changes, write=stage != self._state.stage or not recent)

    def publish(self, record: Candidate | Epoch | Step) -> None:
        """Publish an intermediate part of the report for watchers of the run."""
        event = {"t": now(), "kind": type(record).__name__.lower(), "record": record.model_dump(mode="json")}
        with self._lock, suppress(OSError):
            if not self._closed.is_set() and self._published < MAX_PUBLISHED:
                os.write(self._events, json.dumps(event).encode() + b"\n")
                self._published += 1

    def store_time_shares(self) -> None:
        """Store the time shares of this run for later runs of its kind."""
        shares = self._remaining.finished(time.monotonic())
        if shares is not None and self._kind:
            store_shares(shares_file(), self._kind, shares)

    def end(self, ended: RunState) -> None:
        """Write the final state; nothing is written after it."""
        with self._lock:
            self._closed.set()
            self._state = ended
            self._write()

    def close(self) -> None:
        """Stop writing."""
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
                trim_log(self._folder.log_file)


GRID = tuple(step / 20 for step in range(21))
"""Fractions at which a kind's shares of time are kept."""

KEEP = 0.7
"""Weight of earlier runs in the mean; the newest has the rest. Chosen: about the last three runs count."""

MAX_KINDS = 200
"""Maximum kinds of run whose shares are stored, the newest ones. Chosen: some kB."""

MIN_RUN_S = 2.0
"""A shorter run says nothing about how time is shared. Chosen: most of it is the start of the process."""

FIRST_SHARE = 0.02
"""Share of the time below which nothing is estimated. Chosen: the start is the least even part of a run."""


@dataclass(slots=True)
class RemainingTime:
    """Estimates for one run.

    Args:
        began: seconds on the caller's clock.
        shares: share of the whole time, 0..1, at each fraction of `GRID`.
    """

    began: float
    shares: Sequence[float] = GRID
    _passed: list[tuple[float, float]] = field(default_factory=list)
    """Fractions reported, and seconds since the beginning."""
    _left: float | None = None
    _at: float = 0.0

    def report(self, fraction: float, now: float) -> None:
        """Record the completed fraction of the run; one not above the last is ignored."""
        if self._passed and fraction <= self._passed[-1][0]:
            return
        elapsed = now - self.began
        self._passed.append((fraction, elapsed))
        share = self.share(fraction)
        if share >= FIRST_SHARE:
            self._left, self._at = elapsed * (1 - share) / share, now

    def share(self, fraction: float) -> float:
        """Return the share of the whole time, 0..1, at a fraction of the progress."""
        return interpolate(fraction, GRID, self.shares)

    def left(self, now: float) -> float | None:
        """Seconds left; None before there is an estimate, and once it has run out without news."""
        if self._left is None:
            return None
        left = self._left - (now - self._at)
        return round(left, 1) if left > 0 or self._left == 0 else None

    def postpone(self, seconds: float) -> None:
        """Exclude `seconds` of waiting from the elapsed time."""
        self.began += seconds
        self._at += seconds

    def finished(self, now: float) -> list[float] | None:
        """Return the shares of this run at the fractions of `GRID`; None for a run too short to say."""
        elapsed = now - self.began
        within = [(fraction, seconds) for fraction, seconds in self._passed if 0 < fraction < 1]
        if elapsed < MIN_RUN_S or len(within) < 2:
            return None
        fractions = [0.0, *(fraction for fraction, _ in within), 1.0]
        shares = [0.0, *(min(1.0, seconds / elapsed) for _, seconds in within), 1.0]
        return [interpolate(point, fractions, shares) for point in GRID]


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the value at `x` of the line through (xs, ys); `xs` ascend. Constant outside."""
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    after = bisect_right(xs, x)
    x0, x1, y0, y1 = xs[after - 1], xs[after], ys[after - 1], ys[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def read_shares(file: Path | None, kind: str) -> Sequence[float]:
    """Return the stored time shares of a kind of run, or `GRID` (time proportional to progress) if there are none."""
    found = _read(file).get(kind)
    usable = (
        isinstance(found, list)
        and len(found) == len(GRID)
        and all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in found)
        and all(a <= b for a, b in itertools.pairwise(found))
    )
    return tuple(found) if isinstance(found, list) and usable else GRID


def store_shares(file: Path | None, kind: str, shares: Sequence[float]) -> None:
    """Mix a finished run's shares into those of its kind; a read-only folder is ignored."""
    if file is None:
        return
    known = _read(file)
    before = read_shares(file, kind) if kind in known else shares
    mixed = [round(KEEP * old + (1 - KEEP) * new, 4) for old, new in zip(before, shares, strict=True)]
    newest = dict(list(({k: v for k, v in known.items() if k != kind} | {kind: mixed}).items())[-MAX_KINDS:])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(newest))
    except OSError:
        return


def shares_file() -> Path | None:
    """Return the file of the time shares, in OMGOPTIM_CACHE_DIR or the user's cache folder; None without a home."""
    for name, below in (("OMGOPTIM_CACHE_DIR", ""), ("XDG_CACHE_HOME", "omgoptim")):
        value = os.environ.get(name, "")
        if value and Path(value).is_absolute():  # a relative one would lie in whichever project is open
            return Path(value) / below / "time_shares.json"
    try:
        return Path.home() / ".cache" / "omgoptim" / "time_shares.json"
    except RuntimeError:
        return None


def _read(file: Path | None) -> dict[str, object]:
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
