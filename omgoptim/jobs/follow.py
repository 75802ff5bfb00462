"""Watching a run."""

from __future__ import annotations

import time
from collections.abc import Iterator

from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import ENDED, read_state
from omgoptim.reports import RunState


def follow(folder: RunFolder, timeout_s: float | None = None, interval_s: float = 0.25) -> Iterator[RunState]:
    """The state of a run now, again whenever it has changed, and lastly how it ended.

    Stops after `timeout_s` seconds, the run still going; None waits for the end.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    seen: RunState | None = None
    while True:
        state = read_state(folder)
        if seen is None or _without_times(state) != _without_times(seen):
            seen = state
            yield state
        if state.status in ENDED:
            return
        left = interval_s if deadline is None else min(interval_s, deadline - time.monotonic())
        if left <= 0:
            return
        time.sleep(left)


def _without_times(state: RunState) -> RunState:
    return state.model_copy(update={"updated": "", "eta_s": None})
