"""States of runs, corrected on every read.

A worker holds its run's lock until it exits. A run whose worker is gone is not running, whatever its state file says:
the first reader takes the lock and writes the final state.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from omgoptim.errors import OmgoptimError, RunError
from omgoptim.jobs.folder import RunFolder, run_folders
from omgoptim.jobs.processes import end_family, is_alive
from omgoptim.jobs.storage import log_tail, now
from omgoptim.models.security.file_integrity import can_sign
from omgoptim.reports import EfficiencyReport, RunState
from omgoptim.requests import parse
from omgoptim.requests.command import command_of

FOREIGN = "this run was started by another user, or its request or report was changed: its commands are not shown"
ENDED = ("done", "failed", "cancelled")

START_GRACE_S = 10.0
"""Longest time between the creation of a run folder and the start of its worker."""


def read_state(folder: RunFolder) -> RunState:
    """Return the state of a run, corrected if its worker is gone."""
    state = folder.stored_state()
    if state.status in ENDED or _has_worker(folder, state):
        return state
    try:
        with FileLock(folder.worker_lock, timeout=0):
            return finalize_dead_run(folder)
    except Timeout:  # another reader is writing the state, or the worker lives where its process can't be seen
        return folder.stored_state()
    except OSError:  # nothing can be written there: the state is returned, not kept
        return _state_of_dead_run(folder)


def list_runs(project: Path) -> list[RunState]:
    """Return the runs of a project, newest first."""
    states = [read_state(folder) for folder in run_folders(project)]
    return sorted(states, key=lambda state: state.started, reverse=True)


def load_report(folder: RunFolder) -> EfficiencyReport:
    """Return the report of a run that is done.

    Raises:
        RunError: the run has not ended yet, was cancelled, or its report is damaged.
        OmgoptimError: the error that the run failed with, as its kind.
    """
    state = read_state(folder)
    own = folder.is_own_request() or not can_sign()
    if state.status == "failed" and state.error is not None:
        own = own and (folder.is_own_state() or not can_sign())
        raise OmgoptimError.from_dict(state.error if own else state.error | {"fix": ""})
    if state.status == "cancelled":
        raise RunError(f"run {folder.id} was cancelled", "it has no report", repeat_hint(folder))
    if state.status != "done":
        wait = f"omgoptim runs wait {folder.id} (tool: runs, action wait)"
        raise RunError(f"run {folder.id} has not ended", f"it is {state.status}: {state.stage}", wait)
    found = folder.read_report()
    if found is None:
        raise RunError(
            f"the report of run {folder.id} is missing or damaged", str(folder.report_file), repeat_hint(folder)
        )
    report, is_own = found
    return report if own and is_own else _without_commands(report)


def _without_commands(report: EfficiencyReport) -> EfficiencyReport:
    """Return the report of a run that another user requested, without its commands."""
    artifact = report.artifact and report.artifact.model_copy(update={"load": ""})
    update = {
        "warnings": [FOREIGN, *report.warnings],
        "next_steps": [],
        "alternatives": [],
        "repeat": "",
        "artifact": artifact,
    }
    return report.model_copy(update=update)


def as_done(state: RunState, report: EfficiencyReport) -> RunState:
    """Return the state of a run that gave this report."""
    ended = {"status": "done", "stage": "done", "progress": 1.0, "eta_s": None, "updated": now(), "error": None}
    return state.model_copy(update={**ended, "outcome": report.outcome, "summary": report.summary})


def as_failed(state: RunState, error: OmgoptimError) -> RunState:
    """Return the state of a run that ended with this error; its stage stays the one it failed in."""
    return state.model_copy(
        update={"status": "failed", "eta_s": None, "updated": now(), "summary": error.what, "error": error.to_dict()}
    )


def as_cancelled(state: RunState) -> RunState:
    """Return the state of the same run after it was cancelled."""
    error = RunError("the run was cancelled", f"in stage '{state.stage}'" if state.stage else "before it began")
    return as_failed(state, error).model_copy(update={"status": "cancelled"})


def settle(folder: RunFolder, verdict: Callable[[RunState], RunState]) -> RunState:
    """Write how a run ended: its own final state, done if it has a report, else `verdict`.

    The caller holds the run's lock, and no process of the run lives.
    """
    state = folder.stored_state()
    if state.status in ENDED:
        return state
    report = _whole_report(folder)
    if report is not None:  # it ended between its report and its state
        folder.discard_scratch()
        folder.discard_checkpoints()
        ended = as_done(state, report)
    else:
        folder.discard_failed()
        ended = verdict(state)
    with suppress(OSError):  # on a full disk the state is returned, and found out again by the next reader
        folder.write_state(ended)
    return ended


def repeat_hint(folder: RunFolder) -> str:
    """Return the fix for a run without a result: its log, and the command that resumes or repeats it."""
    hint = f"see {folder.log_file}" if folder.log_file.exists() else ""
    if folder.checkpoints.is_dir():
        go_on = f"resume it from its last checkpoint: omgoptim runs resume {folder.id} (tool: runs, action resume)"
        return f"{hint}; {go_on}" if hint else go_on
    if not folder.is_own_request():
        return hint
    try:
        submission = folder.read_request()
        command = command_of(submission.verb, parse(submission.verb, submission.request))
    except OmgoptimError:
        return hint or "start the run again"
    return f"{hint}; run again: {command}" if hint else f"run again: {command}"


def _whole_report(folder: RunFolder) -> EfficiencyReport | None:
    found = folder.read_report()
    return found[0] if found else None


def _has_worker(folder: RunFolder, state: RunState) -> bool:
    process = folder.read_worker()
    if process is not None:
        return is_alive(process)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(state.started)
    return age.total_seconds() < START_GRACE_S


def finalize_dead_run(folder: RunFolder) -> RunState:
    """Write how a run without a worker ended. The caller holds the run's lock, so the state cannot change meanwhile."""
    process = folder.read_worker()
    if process is not None:
        if is_alive(process):  # it was just started
            return folder.stored_state()
        end_family(process, folder.path, grace_s=0)
    return settle(folder, lambda state: as_failed(state, _death_error(folder, state)))


def _state_of_dead_run(folder: RunFolder) -> RunState:
    state, process = folder.stored_state(), folder.read_worker()
    if state.status in ENDED or (process is not None and is_alive(process)):
        return state
    report = _whole_report(folder)
    return as_failed(state, _death_error(folder, state)) if report is None else as_done(state, report)


def _death_error(folder: RunFolder, state: RunState) -> RunError:
    where = f"in stage '{state.stage}'" if state.stage else "before it began"
    why = f"it was killed (by the system when memory ran out, perhaps) or crashed {where}"
    return RunError("the worker died", why, repeat_hint(folder), log_tail(folder.log_file))
