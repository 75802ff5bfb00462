"""Going on with a run that was cut off: the same folder, the same request, from its last checkpoint."""

from __future__ import annotations

from filelock import FileLock, Timeout

from omgoptim.errors import RunError
from omgoptim.jobs.folder import RunFolder, Submission, now
from omgoptim.jobs.interpreter import find_interpreter, require
from omgoptim.jobs.states import ENDED, read_state
from omgoptim.jobs.submit import WORKER, start_worker
from omgoptim.reports import RunState
from omgoptim.requests import GRANTS, VERBS

LOCK_LIMIT_S = 5.0


def resume(folder: RunFolder, program: str = WORKER) -> RunState:
    """Start a failed or cancelled run again. What it had not checkpointed is done anew.

    Raises:
        RunError: the run is done, or still going on.
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
        raise RunError(f"run {folder.id} has no readable request.json", f"there is no verb '{submission.verb}'")
    if not folder.is_own_request():
        submission = _without_grants(folder, submission)
    try:
        with FileLock(folder.worker_lock, timeout=LOCK_LIMIT_S):
            reopen(folder, state, submission)
    except Timeout:
        raise RunError(
            f"run {folder.id} is being started or ended right now", "its lock is held", "try again"
        ) from None
    start_worker(folder, submission.python, submission.project, program)
    return folder.stored_state()


def reopen(folder: RunFolder, state: RunState, submission: Submission) -> None:
    """Write that an ended run begins again; what it had checkpointed stays. The caller holds the run's lock."""
    folder.worker_file.unlink(missing_ok=True)
    time, stage = now(), "going on from the last checkpoint" if folder.checkpoints.is_dir() else "starting over"
    again = {"status": "starting", "stage": stage, "progress": None, "eta_s": None, "pid": None}
    again |= {"started": time, "updated": time, "summary": None, "error": None}
    folder.write_request(submission)
    folder.write_state(state.model_copy(update=again))


def _without_grants(folder: RunFolder, submission: Submission) -> Submission:
    """A request that this user did not write, as anybody may ask it: it runs in this project, in the project's Python.

    What it says of further folders, modules, trust, a Python of its own or another machine grants nothing.
    """
    project = folder.path.parents[2]
    kept = {
        name: value for name, value in submission.request.items() if name not in (*GRANTS, "python", "project", "on")
    }
    interpreter = find_interpreter(project, None)
    require(interpreter)
    python = str(interpreter.path)
    return Submission(submission.verb, kept, project, python, interpreter.found_by, interpreter.version)
