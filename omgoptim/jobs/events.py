"""The history of a run, from its `events.jsonl`: its stages with their times, and the loss of its training."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from omgoptim.jobs.folder import RunFolder
from omgoptim.text import clean

MOST_STAGES = 500
MOST_READ_BYTES = 4 * 2**20
"""Read at once; the rest of a larger file is read by the next call."""

EPOCH = re.compile(r"epoch (\d+) of (\d+), loss (\d[\d.e+-]*)")
"""How the stage of a training ends: see `training._loop.progress`."""


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
    """The stages of a run so far; `read` adds what was written since the last call."""

    folder: RunFolder
    stages: list[Stage] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Loss at the end of each epoch of the training that goes on, or of the last one."""
    _epoch: int = 0
    _offset: int = 0

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
            at, text = datetime.fromisoformat(event["t"]).timestamp(), clean(str(event["stage"]), 200)
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        name = text.partition(": ")[0]
        if self.stages:
            self.stages[-1] = replace(self.stages[-1], ended=max(at, self.stages[-1].began))
        if not self.stages or self.stages[-1].name != name:
            self.stages = [*self.stages[1 - MOST_STAGES :], Stage(name, at, at)]
        if found := EPOCH.search(text):
            self._add_loss(int(found[1]), float(found[3]))

    def _add_loss(self, epoch: int, loss: float) -> None:
        if epoch < self._epoch:  # another training began
            self.losses = []
        if epoch == self._epoch and self.losses:
            self.losses[-1] = loss
        else:
            self.losses.append(loss)
        self._epoch = epoch
