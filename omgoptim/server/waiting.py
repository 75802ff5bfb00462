"""Wait for a run inside a call: bounded, with progress notifications, independent of the run."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio.to_thread import run_sync

from omgoptim.errors import RequestError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import ENDED, read_state
from omgoptim.render import numbers
from omgoptim.reports import RunState
from omgoptim.requests.limits import shortened

DEFAULT_WAIT_S = 45.0
"""Several clients cut a call at 60 s."""

MAX_DEFAULT_S = 55.0
"""Longest wait of a client that does not ask for progress: below those 60 s."""

MAX_WITH_PROGRESS_S = 600.0
"""A client that asks for progress sees that the call is alive, and may wait longer if it says so. Chosen: ten minutes,
since a client may still limit a call."""

HEARTBEAT_S = 8.0
"""Longest silence while waiting: some clients end a call that shows no progress."""

INTERVAL_S = 0.25
"""Seconds between two reads of the run's state. Chosen: short against the second that a reader notices."""


Report = Callable[[float, float | None, str | None], Awaitable[None]]
"""`report(progress, total, message)`"""


def longest_wait(progress: bool = False) -> float:
    """Return the maximum wait of a call in seconds: OMGOPTIM_MAX_WAIT_S, else more if the client requested progress."""
    text = os.environ.get("OMGOPTIM_MAX_WAIT_S", "")
    default = MAX_WITH_PROGRESS_S if progress else MAX_DEFAULT_S
    try:
        return max(0.0, float(text)) if text else default
    except ValueError:
        return default


def default_wait() -> float:
    """Return the seconds that a call waits by default."""
    return min(DEFAULT_WAIT_S, longest_wait())


def wait_seconds(given: Any, progress: bool = False) -> float:
    """Return the seconds to wait for a `wait_s`; `progress` as for `longest_wait`.

    Raises:
        RequestError: it is not a number of seconds.
    """
    if given is None:
        return default_wait()
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= 0:
        fix = "give seconds, 0 or more, or leave it out"
        raise RequestError(f"{shortened(given)} is not a value of wait_s", "it is not a number of seconds", fix)
    return min(float(given), longest_wait(progress))


def cap_warning(given: Any, progress: bool = False) -> str | None:
    """Return the warning that a wait was capped; None if it was not."""
    cap = longest_wait(progress)
    if given is None or not float(given) > cap:
        return None
    return f"wait_s {given:g} is above the longest wait of a call, {cap:g} s (OMGOPTIM_MAX_WAIT_S of the server)"


async def wait_for(folder: RunFolder, seconds: float, report: Report) -> RunState:
    """Return the state of a run when it has ended, or after `seconds`. Cancelling the call leaves the run alone."""
    deadline = time.monotonic() + seconds
    reported: tuple[object, ...] | None = None
    reported_at = 0.0
    shown = 0.0
    while True:
        state = await run_sync(read_state, folder)
        now = time.monotonic()
        key = (state.status, state.stage, state.progress)
        if key != reported or now - reported_at >= HEARTBEAT_S:
            shown = min(100.0, max(shown + 0.01, 100 * (state.progress or 0.0)))  # it must grow with every notification
            await report(shown, 100.0, numbers.progress_text(state))
            reported, reported_at = key, now
        if state.status in ENDED or now >= deadline:
            return state
        await anyio.sleep(min(INTERVAL_S, deadline - now))
