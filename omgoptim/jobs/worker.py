"""Worker process of a run, in the user's Python.

Whatever happens here ends in a true state. What cannot be caught (a kill, a crash of the interpreter) leaves the
run's lock free, and the next reader writes the truth.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from filelock import FileLock

from omgoptim.bootstrap import PACKAGE_FILE
from omgoptim.errors import OmgoptimError, UserCodeError
from omgoptim.jobs.device_queue import DeviceQueue, Wait, device_of
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.processes import end_processes, this_process
from omgoptim.jobs.progress import Progress
from omgoptim.jobs.report_files import write_report_files
from omgoptim.jobs.states import ENDED, as_cancelled, as_done, as_failed, write_final_state
from omgoptim.jobs.step_runs import StepRuns, cancel_steps
from omgoptim.jobs.storage import full_disk, keep_reserve
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Request, parse, technique_field

if TYPE_CHECKING:
    from omgoptim.operations.context import RunContext

    RunVerb = Callable[[str, Request, RunContext], EfficiencyReport]

LOCK_LIMIT_S = 10.0
"""Time limit for the run's lock, which a reader of the state holds only while it corrects it."""

EXIT_LIMIT_S = 10.0
"""Longest delay of the exit by threads that the user's code left running. Chosen: the report is written before."""


def main(run_path: str) -> None:
    """Execute the run of a folder, then exit. Standard output and standard error are the run's log."""
    faulthandler.enable()
    folder = RunFolder(Path(run_path))
    execute(folder, _operations)
    end_processes(this_process(), folder.path, grace_s=0)  # what the user's code left running
    last_resort = threading.Timer(EXIT_LIMIT_S, os._exit, (0,))
    last_resort.daemon = True
    last_resort.start()


def execute(folder: RunFolder, run_verb: RunVerb, *, owns_process: bool = True) -> None:
    """Execute the run of a folder with `run_verb`, and write its final state.

    Without `owns_process` the process is a caller's, whose signals and imports are left alone.
    """
    with FileLock(folder.worker_lock, timeout=LOCK_LIMIT_S):
        state = folder.stored_state()
        if state.status in ENDED:  # cancelled before it began
            return
        process = this_process()
        folder.write_worker(process)
        keep_reserve(folder.path)
        with Progress(folder, state.model_copy(update={"pid": process.pid})) as progress:
            if not owns_process:
                _do(folder, run_verb, progress, owns_process)
                return
            before = signal.signal(signal.SIGTERM, _cancelled(folder, progress))
            _make_importable()
            _do(folder, run_verb, progress, owns_process)
            signal.signal(signal.SIGTERM, before)


def _do(folder: RunFolder, run_verb: RunVerb, progress: Progress, owns_process: bool) -> None:
    worker = os.getpid()
    try:
        report = _run(folder, run_verb, progress)
        _write_results(folder, report)
        ended = as_done(progress.state, report)
        folder.discard_scratch()
        folder.discard_checkpoints()
        progress.store_time_shares()
    except BaseException as error:
        if os.getpid() != worker:  # a child that the user's code forked came up to here: the run is not its own
            os._exit(1)
        _log(folder, error)
        ended = as_failed(progress.state, _as_omgoptim_error(folder, error))  # before what filled a disk is removed
        folder.discard_failed()
        if isinstance(error, KeyboardInterrupt) and not owns_process:  # the caller's own Ctrl-C
            progress.end(as_cancelled(progress.state))
            raise
    progress.end(ended)


def _run(folder: RunFolder, run_verb: RunVerb, progress: Progress) -> EfficiencyReport:
    from omgoptim.operations.context import RunContext  # from here on an import that fails is a failed run

    submission = folder.read_request()
    request = parse(submission.verb, submission.request)
    resumed = folder.checkpoints.is_dir()  # its fractions begin in the middle
    progress.start("getting ready", "" if resumed else _kind_of(submission.verb, request))
    device = device_of(request)
    turns = _DeviceAccess(DeviceQueue(device, folder.id), progress) if device else None
    steps = StepRuns(folder, submission, progress.report, execute)
    context = RunContext(
        folder.path,
        folder.id,
        submission.project,
        submission.python,
        submission.found_by,
        progress=turns.report if turns else progress.report,
        measuring=turns.measuring if turns else nullcontext,
        run_step=steps,
        begin_step=steps.begin,
        publish=progress.publish,
        report_unpaused=progress.report,
    )
    folder.work.mkdir(exist_ok=True)
    return run_verb(submission.verb, request, context)


def _kind_of(verb: str, request: Request) -> str:
    """Return the key under which time shares are stored: verb, technique and timing."""
    technique = technique_field(type(request))
    params = getattr(request, technique) if technique else None
    names = (verb, params.bare(technique) if params and technique else "", getattr(request, "timing", ""))
    return " ".join(name for name in names if name and len(name) <= 40)


class _DeviceAccess:
    """Device access of a run: exclusive while it measures, paused while another run measures."""

    def __init__(self, queue: DeviceQueue, progress: Progress) -> None:
        self._queue = queue
        self._progress = progress

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the device; the run is queued until it may."""
        with self._queue.turn(self._waiting):
            self._progress.end_wait()
            yield

    def report(self, stage: str, fraction: float | None) -> None:
        """Report progress, once no other run measures."""
        if self._queue.pause(self._waiting):
            self._progress.end_wait()
        self._progress.report(stage, fraction)

    def _waiting(self, wait: Wait) -> None:
        self._progress.wait(wait.text(self._queue.device))


def _make_importable() -> None:
    """Make omgoptim's checkout importable, last on the path.

    The project is importable only once code of it was named (`models/user_code.py`), so that a `torch.py` in it does
    not shadow torch.
    """
    packages = PACKAGE_FILE.parent.parent
    if packages.name not in ("site-packages", "dist-packages"):  # another Python's packages must not leak into this one
        sys.path.append(str(packages))


def _operations(verb: str, request: Request, context: RunContext) -> EfficiencyReport:
    from omgoptim.operations import run_verb  # the first import of torch

    return run_verb(verb, request, context)


def _write_results(folder: RunFolder, report: EfficiencyReport) -> None:
    """Write the page, badge and card, then the report: a run with a report is done."""
    try:
        write_report_files(folder, report)
    except Exception as error:  # noqa: BLE001 a page that cannot be drawn must not lose what was measured
        _log(folder, error)
    folder.write_report(report)


def _as_omgoptim_error(folder: RunFolder, error: BaseException) -> OmgoptimError:
    full = full_disk(folder.path, error)
    if full is not None:
        return full
    if isinstance(error, OmgoptimError):
        return error
    last_line = traceback.format_exception_only(type(error), error)[-1].strip()
    if not isinstance(
        error, Exception
    ):  # nothing of omgoptim raises such: the model's, the data's or the metric's code
        return UserCodeError(
            f"the user's code ended the run: {last_line}",
            f"it raised {type(error).__name__}, which is not an Exception, in stage '{folder.stored_state().stage}'",
            f"raise an Exception, or nothing; {folder.log_file} has the traceback",
        )
    fix = f"see {folder.log_file}; if it is not your model or your machine's memory, report it with that file"
    return OmgoptimError(f"omgoptim itself failed: {last_line}", f"in run {folder.id}", fix)


def _log(folder: RunFolder, error: BaseException) -> None:
    """Append the traceback to the log; the user's code may have closed or replaced sys.stderr, the disk may be full."""
    with suppress(OSError), folder.log_file.open("a", encoding="utf-8", errors="backslashreplace") as log:
        traceback.print_exception(type(error), error, error.__traceback__, file=log)


def _cancelled(folder: RunFolder, progress: Progress) -> Callable[[int, FrameType | None], None]:
    """Return a SIGTERM handler that writes the cancelled state and ends the run's processes."""
    process = this_process()

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 the signature of a handler
        if os.getpid() != process.pid:  # a forked child inherits the handler, not the run
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        progress.close()
        end_processes(process, folder.path, grace_s=0)
        write_final_state(folder, as_cancelled)
        cancel_steps(folder)
        os._exit(128 + number)

    return handle
