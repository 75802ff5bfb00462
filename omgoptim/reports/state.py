"""Answers of the verbs without a run: the setup, and the state of a run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from omgoptim.reports.base import Record
from omgoptim.reports.measured import Candidate
from omgoptim.reports.training import Epoch, Step


class PackageState(Record):
    """State of a package, and the remedy if it cannot be used."""

    exact: ClassVar[tuple[str, ...]] = ("fix",)

    name: str
    state: Literal["ok", "missing", "broken"]
    version: str | None = None
    unlocks: str
    fix: str | None = None


class DoctorReport(Record):
    """Capabilities of a machine and its Python."""

    exact: ClassVar[tuple[str, ...]] = ("python", "project")

    outcome: Literal["ok", "incomplete"]
    summary: str
    python: str
    python_found_by: str
    python_version: str
    cpu: str
    cpu_features: list[str]
    cores: int
    gpu: str | None
    target: str | None = None
    """Address of the inspected machine; null: this one."""
    memory_bytes: int | None = None
    """Memory of a target."""
    runtimes: list[PackageState]
    extras: list[PackageState]
    project: str
    mcp_entry: dict[str, Any]
    """The entry to paste into an MCP client's configuration; empty for a target."""


class RunState(Record):
    """State of a run: the file `state.json` of its folder, updated on every read."""

    exact: ClassVar[tuple[str, ...]] = ("folder", "model")
    multiline: ClassVar[tuple[str, ...]] = ("error",)

    run_id: str
    verb: str
    status: Literal["starting", "queued", "running", "done", "failed", "cancelled"]
    stage: str = ""
    progress: float | None = Field(None, ge=0, le=1)
    """Fraction done, 0..1."""
    eta_s: float | None = Field(None, ge=0, le=1e9)
    """Seconds left, without the wait of a queued run."""
    started: str
    """ISO 8601, UTC."""
    updated: str
    folder: str
    model: str = ""
    pid: int | None = None
    outcome: str | None = None
    summary: str | None = None
    error: dict[str, str] | None = None


class StageTime(Record):
    """A stage of a run and its time so far; a stage that continues after a wait is one stage."""

    name: str
    seconds: float = Field(ge=0)


class LiveRun(Record):
    """Intermediate state of a running run; preliminary until its report."""

    state: RunState
    stages: list[StageTime] = []
    candidates: list[Candidate] = []
    steps: list[Step] = []
    epochs: list[Epoch] = []
    """Epochs of the current training, or of the last one."""
    max_quality_drop: float | None = None
    """The guard; None where there is none."""
