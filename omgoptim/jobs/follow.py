"""Follow a run: its state on every change, and its stages, candidates, steps and epochs so far."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import ENDED, read_state
from omgoptim.reports import Candidate, Epoch, LiveRun, RunState, StageTime, Step
from omgoptim.text import clean


def follow(folder: RunFolder, timeout_s: float | None = None, interval_s: float = 0.25) -> Iterator[RunState]:
    """Yield the state of a run, now and after every change, the final state last.

    Stops after `timeout_s` seconds, the run still going; None waits for the end.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    seen: RunState | None = None
    while True:
        state = read_state(folder)
        if seen is None or _without_times(state) != _without_times(seen):
            seen = state
            yield state
        if state.status in ENDED:
            return
        left = interval_s if deadline is None else min(interval_s, deadline - time.monotonic())
        if left <= 0:
            return
        time.sleep(left)


def _without_times(state: RunState) -> RunState:
    return state.model_copy(update={"updated": "", "eta_s": None})


MAX_BYTES = 8 * 2**20
"""Most of the events that is read: days of a run."""
MAX_STAGES, MAX_RECORDS = 40, 200
"""Most stages and records that are shown, the last ones. Chosen: what fits a page."""

_KINDS: dict[str, type[Candidate] | type[Step] | type[Epoch]] = {"candidate": Candidate, "step": Step, "epoch": Epoch}


def read_live(folder: RunFolder) -> LiveRun:
    """Return the intermediate state of a run; unreadable events are skipped."""
    stages: dict[str, float] = {}
    before: tuple[str, float] | None = None
    found: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    for event in _events(folder):
        try:
            if event.get("kind") in _KINDS:
                found[event["kind"]].append(_KINDS[event["kind"]].model_validate(event["record"]))
            else:
                at, name = datetime.fromisoformat(event["t"]).timestamp(), _name(event["stage"])
                if before is not None:
                    stages[before[0]] += max(0.0, at - before[1])
                stages.setdefault(name, 0.0)
                before = name, at
        except (ValueError, KeyError, TypeError):
            continue
    return LiveRun(
        state=read_state(folder),
        stages=[StageTime(name=name, seconds=seconds) for name, seconds in stages.items()][-MAX_STAGES:],
        candidates=list({one.name: one for one in found["candidate"]}.values())[-MAX_RECORDS:],
        steps=found["step"][-MAX_RECORDS:],
        epochs=_last_training(found["epoch"])[-MAX_RECORDS:],
        max_quality_drop=_guard(folder),
    )


def _events(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        with folder.events_file.open("rb") as file:
            lines = file.read(MAX_BYTES).splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # the last line may be half written
            continue
        events += [event] if isinstance(event, dict) else []
    return events


def _name(stage: Any) -> str:
    """Return the stage without the detail after a colon, which changes often."""
    return clean(str(stage), 200).partition(": ")[0]


def _last_training(epochs: list[Epoch]) -> list[Epoch]:
    """Return the epochs since the last training began: its rounds and epochs only grow."""
    begin = 0
    for place in range(1, len(epochs)):
        before, epoch = epochs[place - 1], epochs[place]
        if (epoch.round, epoch.epoch) <= (before.round, before.epoch):
            begin = place
    return epochs[begin:]


def _guard(folder: RunFolder) -> float | None:
    try:
        allowed = folder.read_request().request.get("max_quality_drop")
    except OmgoptimError:
        return None
    return float(allowed) if isinstance(allowed, (int, float)) else None
