"""Actions on a run: cancel, resume, and pick another finalist."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from omgoptim.errors import RunError, did_you_mean
from omgoptim.jobs.folder import RunFolder, Submission
from omgoptim.jobs.interpreter import find_interpreter, require
from omgoptim.jobs.processes import end_processes
from omgoptim.jobs.report_files import write_report_files
from omgoptim.jobs.states import ENDED, as_cancelled, as_done, load_report, read_state, write_final_state
from omgoptim.jobs.storage import now
from omgoptim.jobs.submit import WORKER, start_worker
from omgoptim.models.report_file import read_report
from omgoptim.reports import EfficiencyReport, RunState
from omgoptim.requests import GRANTS, VERBS

LOCK_LIMIT_S = 5.0
"""Time limit for a run's lock, which other commands hold only while they change its files. Chosen: files are written in
milliseconds."""


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Hold a run's lock, so that no other process changes the run."""
    lock = FileLock(folder.worker_lock)
    try:
        lock.acquire(timeout=LOCK_LIMIT_S)
    except Timeout:
        raise RunError(
            f"run {folder.id} is being changed by another process",
            f"it holds {folder.worker_lock}",
            f"wait until `omgoptim runs show {folder.id}` says how the run ended, then repeat this",
        ) from None
    try:
        yield
    finally:
        lock.release()


def cancel(folder: RunFolder, grace_s: float = 3.0) -> RunState:
    """End a run and all of its processes; a run that has ended is returned unchanged.

    Its processes are asked to end, and killed after `grace_s` seconds.

    Raises:
        RunError: the run could not be ended.
    """
    state = read_state(folder)
    if state.status in ENDED:
        return state
    process = folder.read_worker()
    if process is not None:
        end_processes(process, folder.path, grace_s)
    try:
        with FileLock(folder.worker_lock, timeout=LOCK_LIMIT_S):
            return write_final_state(folder, as_cancelled)
    except Timeout:
        raise RunError(
            f"run {folder.id} could not be ended",
            f"process {process.pid if process else 'unknown'} still holds {folder.worker_lock}",
            "end that process yourself, or cancel again where it was started",
        ) from None


def resume(folder: RunFolder, program: str = WORKER) -> RunState:
    """Restart a failed or cancelled run from its last checkpoint.

    Raises:
        RunError: the run is done, or still running.
        SetupError: its Python cannot be started any more, or, for a run that this user did not ask for, none was found.
    """
    state = read_state(folder)
    if state.status == "done":
        raise RunError(f"run {folder.id} is done", "there is nothing to resume", f"omgoptim runs show {folder.id}")
    if state.status not in ENDED:
        wait = f"omgoptim runs wait {folder.id} (tool: runs, action wait)"
        raise RunError(f"run {folder.id} is {state.status} already", state.stage, wait)
    submission = folder.read_request()
    if submission.verb not in VERBS:
        raise RunError(f"run {folder.id} has no readable request.json", f"unknown command '{submission.verb}'")
    if not folder.is_own_request():
        submission = _without_grants(folder, submission)
    with _locked(folder):
        reopen(folder, state, submission)
    start_worker(folder, submission.python, submission.project, program)
    return folder.stored_state()


def reopen(folder: RunFolder, state: RunState, submission: Submission) -> None:
    """Mark an ended run as starting again; its checkpoints stay. The caller holds the run's lock."""
    folder.worker_file.unlink(missing_ok=True)
    time, stage = now(), "resuming from the last checkpoint" if folder.checkpoints.is_dir() else "starting over"
    again = {"status": "starting", "stage": stage, "progress": None, "eta_s": None, "pid": None}
    again |= {"started": time, "updated": time, "summary": None, "error": None}
    folder.write_request(submission)
    folder.write_state(state.model_copy(update=again))


def _without_grants(folder: RunFolder, submission: Submission) -> Submission:
    """Return a request that another user wrote without extended rights: in this project, in the project's Python.

    Its further folders and modules, trust, Python and machine are ignored.
    """
    project = folder.path.parents[2]
    kept = {
        name: value for name, value in submission.request.items() if name not in (*GRANTS, "python", "project", "on")
    }
    interpreter = find_interpreter(project, None)
    require(interpreter)
    python = str(interpreter.path)
    return Submission(submission.verb, kept, project, python, interpreter.found_by, interpreter.version)


def pick(folder: RunFolder, name: str) -> EfficiencyReport:
    """Replace a run's artifact by another finalist, and keep the previous artifact as a finalist.

    Args:
        folder: of the run.
        name: of an entry of the report's `alternatives`.

    Returns:
        The run's new report: the picked one's own numbers, as they were measured.

    Raises:
        RunError: the run is not done, keeps nothing of that name, or is being changed by another process.
    """
    with _locked(folder):
        report = load_report(folder)
        known = [alternative.name for alternative in report.alternatives if _is_plain(alternative.name)]
        if name == report.delivered:
            return report
        if name not in known or report.delivered is None or not _is_plain(report.delivered):
            what = f"run {folder.id} has no finalist '{name}'"
            raise RunError(
                what, did_you_mean(name, known) or "it has no other finalists", f"omgoptim runs show {folder.id}"
            )
        kept = folder.alternatives
        picked = _report_of(kept / f"{name}.json", folder.id).model_copy(update={"guard": report.guard})
        folder.write_report_to(kept / f"{report.delivered}.json", report)
        _swap(folder.artifact, kept / name, kept / report.delivered)
        folder.write_report(picked)
        folder.write_state(as_done(folder.stored_state(), picked))
        write_report_files(folder, picked)
    return picked


def _is_plain(name: str) -> bool:
    """Return whether a name is a plain entry name that cannot lead out of the run's folder."""
    return re.fullmatch(r"[a-z0-9][a-z0-9-]{0,100}", name) is not None


def _report_of(file: Path, run: str) -> EfficiencyReport:
    found = read_report(file, run)
    if found is None or not found[1]:
        why = "it cannot be read" if found is None else "it was changed, or written by someone else"
        hint = "run it again: its kept artifacts are incomplete"
        raise RunError(f"the report of '{file.stem}' is missing or damaged", f"{file}: {why}", hint)
    return found[0]


def _swap(artifact: Path, picked: Path, old: Path) -> None:
    """Move the artifact to `old` and `picked` to its place; on failure, leave both unchanged."""
    if picked.is_symlink() or not picked.is_dir():
        raise RunError(f"the artifact of '{picked.name}' is gone", str(picked), "run it again")
    os.replace(artifact, old)
    try:
        os.replace(picked, artifact)
    except OSError:
        os.replace(old, artifact)
        raise
