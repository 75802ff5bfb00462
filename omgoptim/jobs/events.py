"""The history of a run, from its `events.jsonl`: its stages with their times, and what it has measured so far."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import read_state
from omgoptim.reports import Candidate, Epoch, LiveRun, StageTime, Step
from omgoptim.text import clean

MOST_STAGES = 500
MOST_READ_BYTES = 4 * 2**20
"""Read at once; the rest of a larger file is read by the next call."""
MOST_READS = 8
"""Of those, for one look at a run."""
MOST_SHOWN, MOST_RECORDS = 40, 200
"""Most stages and records of a run that goes on, the last ones."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run. What follows a colon in its text is a detail that may change often."""

    name: str
    began: float
    """Seconds since the epoch."""
    ended: float
    """The same, of the last event; the stage may go on."""


@dataclass(slots=True)
class RunHistory:
    """The stages of a run so far, and what it published; `read` adds what was written since the last call."""

    folder: RunFolder
    stages: list[Stage] = field(default_factory=list)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    """By name: what is known last."""
    steps: list[Step] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    """Of the training that goes on, or of the last one."""
    _offset: int = 0

    @property
    def losses(self) -> list[float]:
        """Return the losses of `epochs` that are numbers."""
        return [epoch.loss for epoch in self.epochs if epoch.loss is not None]

    def read(self) -> RunHistory:
        """Read the events that are new; a line that is no event is passed over."""
        try:
            with self.folder.events_file.open("rb") as file:
                file.seek(self._offset)
                whole, _, _ = file.read(MOST_READ_BYTES).rpartition(b"\n")
        except OSError:
            return self
        self._offset += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            self._add(line)
        return self

    def _add(self, line: bytes) -> None:
        try:
            event: dict[str, Any] = json.loads(line)
            if "record" in event:
                self._add_record(event["kind"], event["record"])
                return
            at, text = datetime.fromisoformat(event["t"]).timestamp(), clean(str(event["stage"]), 200)
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        name = text.partition(": ")[0]
        if self.stages:
            self.stages[-1] = replace(self.stages[-1], ended=max(at, self.stages[-1].began))
        if not self.stages or self.stages[-1].name != name:
            self.stages = [*self.stages[1 - MOST_STAGES :], Stage(name, at, at)]

    def _add_record(self, kind: Any, record: Any) -> None:
        if kind == "candidate":
            candidate = Candidate.model_validate(record)
            self.candidates[candidate.name] = candidate
        elif kind == "step":
            self.steps.append(Step.model_validate(record))
        elif kind == "epoch":
            epoch = Epoch.model_validate(record)
            before = self.epochs[-1] if self.epochs else None
            if before is not None and (epoch.round, epoch.epoch) <= (before.round, before.epoch):
                self.epochs.clear()  # another training began
            self.epochs.append(epoch)


def read_live(folder: RunFolder) -> LiveRun:
    """Return what is known of a run so far."""
    history = RunHistory(folder)
    for _ in range(MOST_READS):
        history.read()
    times: dict[str, float] = {}
    for stage in history.stages:
        times[stage.name] = times.get(stage.name, 0.0) + stage.ended - stage.began
    return LiveRun(
        state=read_state(folder),
        stages=[StageTime(name=name, seconds=seconds) for name, seconds in times.items()][-MOST_SHOWN:],
        candidates=list(history.candidates.values())[-MOST_RECORDS:],
        steps=history.steps[-MOST_RECORDS:],
        epochs=history.epochs[-MOST_RECORDS:],
        max_quality_drop=_guard(folder),
    )


def _guard(folder: RunFolder) -> float | None:
    try:
        allowed = folder.read_request().request.get("max_quality_drop")
    except OmgoptimError:
        return None
    return float(allowed) if isinstance(allowed, (int, float)) else None
