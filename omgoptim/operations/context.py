"""Context of one run: its folder, Python, progress callback and measurement lock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import RunError
from omgoptim.reports import Candidate, EfficiencyReport, Epoch, Step
from omgoptim.requests import Request

if TYPE_CHECKING:
    from omgoptim.measure.target.client import Target
    from omgoptim.operations.loaded_model import Live

LIVE = "(live {})"
"""Placeholder in a request for a Python object of the caller: `(live module)`, `(live data)`."""


def is_live(name: object) -> bool:
    """Return whether a request's argument is a placeholder for a Python object of the caller."""
    return isinstance(name, str) and name.startswith("(live ")


@dataclass(frozen=True, slots=True)
class StepRun:
    """A finished run that was a step of another run."""

    run_id: str
    folder: Path
    report: EfficiencyReport


RunStep = Callable[[str, str, Request, "Live", tuple[float, float]], StepRun]
"""`run_step(key, verb, request, live, span)`: execute a verb as a separate run in this process; `span` is its part of
this run's progress. A run that was started under this key is resumed in its folder. Raises the error of that run."""


def _no_steps(*_: object) -> Any:
    raise RunError("this run cannot start other runs")


@dataclass(frozen=True, slots=True)
class Stage:
    """Named part of a run, with the fractions of the run's progress at its start and end."""

    context: RunContext
    doing: str
    span: tuple[float, float]

    def report(self, done: float) -> None:
        """Report the completed fraction of the stage, 0..1."""
        start, end = self.span
        self.context.progress(self.doing, start + (end - start) * done)


@dataclass(frozen=True, slots=True)
class RunContext:
    """Context of one run."""

    folder: Path
    """The run's folder."""
    run_id: str
    project: Path
    python: str
    """Path of the Python that executes the run."""
    found_by: str
    """Origin of that Python, for instance `the project's .venv`."""
    progress: Callable[[str, float | None], None]
    """`progress(stage, fraction)`: current stage and completed fraction of the run, 0..1;
    `None` leaves the fraction unchanged."""
    measuring: Callable[[], AbstractContextManager[None]] = nullcontext
    """`with measuring():` locks the device for measurements on the machine that measures."""
    run_step: RunStep = _no_steps
    publish: Callable[[Candidate | Epoch | Step], None] = lambda _record: None
    """Publish an intermediate record for watchers of the run."""
    target: Target | None = None
    """The machine that measures; None: this one."""
    measuring_here: Callable[[], AbstractContextManager[None]] | None = None
    """With a target: locks the device of this machine."""
    report_unpaused: Callable[[str, float | None], None] | None = None
    """`progress` that does not pause while another run measures on this machine."""
    begin_step: Callable[[str, str, Request], Path] = _no_steps
    """`begin_step(key, verb, request)`: folder of a step's run that another process executes; `run_step` resumes it."""

    def part(self, start: float, end: float, prefix: str = "") -> Callable[[str, float | None], None]:
        """Return a progress callback for a part of the run, whose fractions 0..1 are mapped to `start`..`end`."""
        return lambda stage, done: self.progress(
            f"{prefix}{stage}", None if done is None else start + (end - start) * done
        )

    @property
    def work(self) -> Path:
        """Scratch folder, removed when the run ends."""
        return self.folder / "work"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, kept until the run is done."""
        return self.folder / "checkpoints"

    @property
    def artifact(self) -> Path:
        """Folder of the artifact, written atomically."""
        return self.folder / "artifact"

    @property
    def alternatives(self) -> Path:
        """Folder of the other finalists: NAME/ is the artifact, NAME.json its report."""
        return self.folder / "alternatives"
