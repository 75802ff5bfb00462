"""Estimate of a run's remaining time, from its progress and from earlier runs of the same kind.

A run reports fixed fractions at its stages; what share of its time they stand for differs by verb, method and machine.
So each finished run leaves the shares of its time at which it passed each fraction, and the next run of that kind reads
its fractions through the mean of them. Between two reports the estimate counts down; it never grows by itself.
"""

from __future__ import annotations

import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omgoptim.jobs.folder import write_whole

GRID = tuple(step / 20 for step in range(21))
"""Fractions at which a kind's shares of time are kept."""

KEEP = 0.7
"""Weight of earlier runs in the mean; the newest has the rest."""

MOST_KINDS = 200
SHORTEST_RUN_S = 2.0
"""A shorter run says nothing about how time is shared."""

FIRST_SHARE = 0.02
"""Share of the time below which nothing is estimated."""


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
        """Note that `fraction` of the run is done; a fraction that was passed already says nothing new."""
        if self._passed and fraction <= self._passed[-1][0]:
            return
        elapsed = now - self.began
        self._passed.append((fraction, elapsed))
        share = self.share(fraction)
        if share >= FIRST_SHARE:
            self._left, self._at = elapsed * (1 - share) / share, now

    def share(self, fraction: float) -> float:
        """The share of the whole time, 0..1, that a fraction stands for."""
        return interpolate(fraction, GRID, self.shares)

    def left(self, now: float) -> float | None:
        """Seconds left; None before there is an estimate, and once it has run out without news."""
        if self._left is None:
            return None
        left = self._left - (now - self._at)
        return round(left, 1) if left > 0 or self._left == 0 else None

    def postpone(self, seconds: float) -> None:
        """Leave `seconds` in which the run waited out of the account."""
        self.began += seconds
        self._at += seconds

    def finished(self, now: float) -> list[float] | None:
        """The shares of this run at the fractions of `GRID`; None for a run too short to say."""
        whole = now - self.began
        within = [(fraction, seconds) for fraction, seconds in self._passed if 0 < fraction < 1]
        if whole < SHORTEST_RUN_S or len(within) < 2:
            return None
        fractions = [0.0, *(fraction for fraction, _ in within), 1.0]
        shares = [0.0, *(min(1.0, seconds / whole) for _, seconds in within), 1.0]
        return [interpolate(point, fractions, shares) for point in GRID]


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The value at `x` of the line through (xs, ys); `xs` ascend. Constant outside."""
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


def learn_shares(file: Path | None, kind: str, shares: Sequence[float]) -> None:
    """Mix a finished run's shares into those of its kind; a folder that cannot be written is no error."""
    if file is None:
        return
    known = _read(file)
    before = read_shares(file, kind) if kind in known else shares
    mixed = [round(KEEP * old + (1 - KEEP) * new, 4) for old, new in zip(before, shares, strict=True)]
    newest = dict(list(({k: v for k, v in known.items() if k != kind} | {kind: mixed}).items())[-MOST_KINDS:])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(newest))
    except OSError:
        return


def shares_file() -> Path | None:
    """Where shares are kept: OMGOPTIM_CACHE_DIR, else the user's cache folder; None where there is no home."""
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
