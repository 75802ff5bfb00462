"""What an operation gets besides its request: where it works, whose Python it is, and whom it tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omgoptim.errors import RunError
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Request

if TYPE_CHECKING:
    from omgoptim.operations.live_objects import Live

LIVE = "(live {})"
"""What a request names where the caller of the Python face gave an object: `(live module)`, `(live data)`."""


def is_live(name: object) -> bool:
    """Whether a request's argument stands for an object of the caller's process, which nobody else can name."""
    return isinstance(name, str) and name.startswith("(live ")


@dataclass(frozen=True, slots=True)
class StepRun:
    """A finished run that was a step of another one."""

    run_id: str
    folder: Path
    report: EfficiencyReport


RunStep = Callable[[str, Request, "Live", tuple[float, float]], StepRun]
"""`run_step(verb, request, live, span)`: do a verb as a run of its own, here and now; `span` is the fraction of the
whole run that it takes. Raises what the run raised."""


def _no_steps(*_: object) -> StepRun:
    raise RunError("this run cannot start others")


@dataclass(frozen=True, slots=True)
class RunContext:
    """One run, as its operation sees it."""

    folder: Path
    """The run's folder."""
    run_id: str
    project: Path
    python: str
    """Path of the Python that does the work."""
    found_by: str
    """How that Python was chosen, for instance `the project's .venv`."""
    progress: Callable[[str, float | None], None]
    """`progress(stage, fraction)`: what is being done now, and the fraction of the whole run that is done, 0..1.
    `None` leaves the fraction as it was."""
    measuring: Callable[[], AbstractContextManager[None]] = nullcontext
    """`with measuring():` holds the device: no other run of this machine measures on it meanwhile."""
    run_step: RunStep = _no_steps

    @property
    def work(self) -> Path:
        """Scratch space: removed when the run ends, however it ends."""
        return self.folder / "work"

    @property
    def checkpoints(self) -> Path:
        """What a run that was cut off goes on from: kept until the run is done."""
        return self.folder / "checkpoints"

    @property
    def artifact(self) -> Path:
        """Where the artifact ends, put there in one rename."""
        return self.folder / "artifact"

    @property
    def alternatives(self) -> Path:
        """Finalists that were not delivered: NAME/ is the artifact, NAME.json its report."""
        return self.folder / "alternatives"
