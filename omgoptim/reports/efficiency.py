"""Report of every verb that starts a run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from omgoptim.reports.base import Record
from omgoptim.reports.measured import (
    Alternative,
    Artifact,
    Candidate,
    Change,
    Environment,
    Gains,
    GainsBy,
    Layer,
    MacsCheck,
    Measurement,
    OutputRecord,
    Skip,
    Total,
)
from omgoptim.reports.precision import Coverage, Explanation, Guard
from omgoptim.reports.training import Control, Round, SensitivityPoint, Step, Training


class NextStep(Record):
    """A recommended call, ready to run."""

    exact: ClassVar[tuple[str, ...]] = ("command",)

    tool: str
    arguments: dict[str, Any]
    command: str
    """Shell command of the call."""
    why: str


class EfficiencyReport(Record):
    """Report of every verb that starts a run: the verdict first, then its evidence."""

    exact: ClassVar[tuple[str, ...]] = ("repeat",)

    outcome: Literal["ok", "no_gain", "guard_failed"]
    summary: str
    """Two or three sentences, the verdict first."""
    warnings: list[str] = []
    next_steps: list[NextStep] = []
    verb: str
    run_id: str
    request: dict[str, Any]
    """The request as it was resolved, defaults included."""
    environment: Environment
    before: Measurement | None = None
    after: Measurement | None = None
    gains: Gains | None = None
    gains_by: GainsBy | None = None
    total: Total | None = None
    outputs: list[OutputRecord] = []
    """Each output of the model, and its agreement with the original's."""
    changed: list[Change] = []
    skipped: list[Skip] = []
    layers: list[Layer] = []
    rounds: list[Round] = []
    training: Training | None = None
    control: Control | None = None
    sensitivity: list[SensitivityPoint] = []
    steps: list[Step] = []
    """Steps of a run with a goal, in order."""
    candidates: list[Candidate] = []
    alternatives: list[Alternative] = []
    delivered: str | None = None
    """Name of the finalist that is the artifact, as `pick` takes it."""
    coverage: Coverage | None = None
    guard: Guard | None = None
    explanation: Explanation | None = None
    macs_check: MacsCheck | None = None
    artifact: Artifact | None = None
    lineage: list[str] = []
    """Run ids that this artifact descends from, oldest first."""
    repeat: str
    """The one command that repeats the run."""
