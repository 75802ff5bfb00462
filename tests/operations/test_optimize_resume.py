"""A killed optimize run resumes where it was: no finished step is repeated, and none is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omgoptim.jobs.actions import resume
from omgoptim.jobs.folder import RunFolder, find_run
from omgoptim.jobs.states import ENDED, list_runs, load_report, read_state
from omgoptim.jobs.submit import submit
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import parse

ARGUMENTS: dict[str, Any] = {
    "model": "net.py:net",
    "checkpoint": "net.pt",
    "data": "net.py:load",
    "timing": "quick",
    "samples": 100,
    "threads": 1,
    "max_quality_drop": 0.03,
    "budget_minutes": 600,  # so that no decision hangs on how long a step took
    "runtime": "onnxruntime",
    "prefer": "size",  # nor on how fast this machine was at the time
    "python": sys.executable,
}

pytestmark = pytest.mark.slow


def until(condition: Callable[[], bool], limit_s: float = 900.0) -> None:
    """Wait for a condition that another process brings about; failing is the only use of the clock."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen in time")
        time.sleep(0.05)


def ledger_of(folder: RunFolder) -> list[dict[str, Any]]:
    file = folder.path / "ledger.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def begun(folder: RunFolder) -> int:
    steps = folder.checkpoints / "steps"
    return len(list(steps.iterdir())) if steps.is_dir() else 0


def ended(folder: RunFolder) -> bool:
    return read_state(folder).status in ENDED


def killed(folder: RunFolder, when: Callable[[], bool]) -> None:
    until(lambda: when() or ended(folder))
    assert not ended(folder), "it ended before it could be killed"
    os.kill(read_state(folder).pid or 0, signal.SIGKILL)
    until(lambda: read_state(folder).status == "failed")


def told(report: EfficiencyReport) -> list[tuple[Any, ...]]:
    """Return what of each step does not depend on the clock."""
    return [(one.name, one.verb, one.parent, one.status, one.size_bytes, one.quality) for one in report.steps]


def test_a_run_that_is_killed_twice_ends_as_one_that_was_not(project: Path) -> None:
    request = parse("optimize", ARGUMENTS)
    whole = submit("optimize", request, project)
    until(lambda: ended(whole))
    expected = load_report(whole)

    cut = submit("optimize", request, project)
    killed(cut, lambda: begun(cut) == 2 and len(ledger_of(cut)) == 1)  # inside the second step
    kept = ledger_of(cut)
    resume(cut)
    killed(cut, lambda: len(ledger_of(cut)) == 3)  # after the third step
    assert ledger_of(cut)[: len(kept)] == kept
    command = [sys.executable, "-m", "omgoptim.cli", "runs", "resume", cut.id]
    subprocess.run(command, cwd=project, check=True, timeout=1200, capture_output=True)

    report = load_report(cut)
    assert told(report) == told(expected)
    assert report.delivered == expected.delivered
    assert report.after is not None
    assert expected.after is not None
    assert (report.after.quality, report.after.size_bytes) == (expected.after.quality, expected.after.size_bytes)
    keys = [entry["key"] for entry in ledger_of(cut)]
    assert len(set(keys)) == len(keys) == len([one for one in report.steps if one.seconds is not None])
    made = {one.run_id for one in [*report.steps, *expected.steps] if one.run_id}
    runs = {state.run_id: state.status for state in list_runs(project)}
    assert set(runs) == made | {whole.id, cut.id}  # no step's run was left behind
    assert set(runs.values()) == {"done"}
    assert find_run(project, cut.id).path == cut.path
