"""Runs that are steps of another run: each has its own folder and runs in the process of that run.

`checkpoints/steps/KEY` in the folder of that run names the run that was begun under a key, so that an
interrupted run resumes its step instead of starting another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omgoptim.jobs.actions import reopen
from omgoptim.jobs.folder import NAME, RunFolder, Submission, is_run
from omgoptim.jobs.interpreter import Interpreter
from omgoptim.jobs.states import ENDED, as_cancelled, load_report, read_state, write_final_state
from omgoptim.jobs.storage import write_atomically
from omgoptim.jobs.submit import open_run
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Request

if TYPE_CHECKING:
    from omgoptim.operations.context import RunContext, StepRun
    from omgoptim.operations.loaded_model import Live


@dataclass(frozen=True, slots=True)
class StepRuns:
    """Executes verbs as steps of a run: see `RunStep`."""

    folder: RunFolder
    """Folder of the run that the steps belong to."""
    submission: Submission
    report: Callable[[str, float | None], None]
    execute: Callable[..., None]
    """`worker.execute`."""

    def __call__(self, key: str, verb: str, request: Request, live: Live, span: tuple[float, float]) -> StepRun:
        """Execute or resume the run of a key and return it; its progress is mapped to `span` of this run.

        Raises:
            OmgoptimError: what the run raised.
        """
        from omgoptim.operations.context import StepRun

        folder = RunFolder(self.begin(key, verb, request))
        start, end = span

        def operation(_verb: str, resolved: Request, context: RunContext) -> EfficiencyReport:
            from omgoptim.operations import run_verb

            def progress(stage: str, done: float | None) -> None:
                context.progress(stage, done)
                self.report(f"{verb}: {stage}", None if done is None else start + (end - start) * done)

            return run_verb(verb, resolved, replace(context, progress=progress), live)

        self.execute(folder, operation, owns_process=False)
        return StepRun(folder.id, folder.path, load_report(folder))

    def begin(self, key: str, verb: str, request: Request) -> Path:
        """Return the folder of the run of a key, new or begun before, ready to be done by this or another process."""
        return (self._begun(key, verb, request) or self._begin(key, verb, request)).path

    def _begin(self, key: str, verb: str, request: Request) -> RunFolder:
        requested = self.submission
        interpreter = Interpreter(Path(requested.python), requested.found_by, requested.version, ())
        folder = open_run(verb, request, requested.project, interpreter)
        place = _steps_of(self.folder)
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / key, folder.id)
        return folder

    def _begun(self, key: str, verb: str, request: Request) -> RunFolder | None:
        """Return the run that was begun under a key, ready to resume unless it is done; None if there is none."""
        folder = _named(self.folder, _steps_of(self.folder) / key)
        if folder is None:
            return None
        state = read_state(folder)
        if state.status in ENDED and state.status != "done":
            requested = self.submission
            again = Submission(
                verb,
                request.model_dump(mode="json"),
                requested.project,
                requested.python,
                requested.found_by,
                requested.version,
            )
            reopen(folder, state, again)
        return folder


def cancel_steps(folder: RunFolder) -> None:
    """Write the cancelled state of all unfinished steps of a cancelled run. The caller is their process."""
    place = _steps_of(folder)
    for name in sorted(place.iterdir()) if place.is_dir() else []:
        step = _named(folder, name)
        if step is not None:
            write_final_state(step, as_cancelled)


def _steps_of(folder: RunFolder) -> Path:
    return folder.checkpoints / "steps"


def _named(folder: RunFolder, file: Path) -> RunFolder | None:
    """Return the run beside `folder` that a file names; None where it names none."""
    try:
        name = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    path = folder.path.parent / name
    is_step = NAME.fullmatch(name) is not None and name != folder.id and is_run(path)
    return RunFolder(path) if is_step else None
