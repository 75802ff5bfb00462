"""Ending a run early."""

from __future__ import annotations

from filelock import FileLock, Timeout

from omgoptim.errors import RunError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.processes import end_family
from omgoptim.jobs.states import ENDED, as_cancelled, read_state, settle
from omgoptim.reports import RunState

LOCK_LIMIT_S = 5.0


def cancel(folder: RunFolder, grace_s: float = 3.0) -> RunState:
    """End a run and every process it started; a run that has ended is returned as it is.

    Its processes are asked to end, and killed after `grace_s` seconds.

    Raises:
        RunError: the run could not be ended.
    """
    state = read_state(folder)
    if state.status in ENDED:
        return state
    process = folder.read_worker()
    if process is not None:
        end_family(process, folder.path, grace_s)
    try:
        with FileLock(folder.worker_lock, timeout=LOCK_LIMIT_S):
            return settle(folder, as_cancelled)
    except Timeout:
        raise RunError(
            f"run {folder.id} could not be ended",
            f"process {process.pid if process else 'unknown'} still holds {folder.worker_lock}",
            "end that process yourself, or cancel again where it was started",
        ) from None
