"""A run that is killed ten times at random moments ends as one that was not, and does nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from omgoptim.jobs.actions import resume
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import ENDED, load_report, read_state
from omgoptim.jobs.submit import submit
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import parse

pytestmark = pytest.mark.slow

KILLS = 10
LIMIT_S = 1800.0

SPACE = """

def space(trial):
    width = trial.suggest_categorical("width", [4, 8, 16])
    kernel = trial.suggest_categorical("kernel", [3, 5])
    return nn.Sequential(nn.Conv2d(1, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))
"""

COMMON: dict[str, Any] = {
    "model": "net.py:net", "checkpoint": "net.pt", "data": "net.py:load", "timing": "quick", "samples": 100,
    "threads": 1, "runtime": "onnxruntime", "python": sys.executable,
}  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {  # no decision hangs on how fast the machine is
    "optimize": COMMON | {"max_quality_drop": 0.03, "budget_minutes": 600, "prefer": "size"},
    "search": COMMON
    | {"space": "net.py:space", "target_size_mb": 0.02, "trials": 4, "epochs": 3, "max_quality_drop": 1.0},
}


def wait(folder: RunFolder, seconds: float = LIMIT_S) -> bool:
    """Wait so long, or until the run has ended; whether it has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if read_state(folder).status in ENDED:
            return True
        time.sleep(0.02)
    return False


def finished(folder: RunFolder) -> dict[str, Any]:
    """Return what is finished: the keys of the ledger, or the times at which trials' results were written."""
    ledger = folder.path / "ledger.jsonl"
    found: dict[str, Any] = {}
    for line in ledger.read_text().splitlines(keepends=True) if ledger.exists() else []:
        if line.endswith("\n"):
            key = json.loads(line)["key"]
            assert key not in found, "a step was taken twice"
            found[key] = line
    return found | {str(file): file.stat().st_mtime_ns for file in folder.path.glob("search/**/result.json")}


def told(report: EfficiencyReport) -> Any:
    """Return what of the result does not depend on the clock."""
    steps = [(one.name, one.verb, one.parent, one.status, one.size_bytes, one.quality) for one in report.steps]
    tried = [(one.name, one.status, one.size_bytes, one.quality) for one in report.candidates]
    assert report.after is not None
    return steps, tried, report.delivered, report.after.quality, report.after.size_bytes


@pytest.mark.parametrize("verb", list(REQUESTS))
def test_ten_kills_at_random_change_nothing(verb: str, project: Path) -> None:
    (project / "net.py").write_text((project / "net.py").read_text() + SPACE)
    request = parse(verb, REQUESTS[verb])
    began = time.monotonic()
    whole = submit(verb, request, project)
    assert wait(whole)
    longest = time.monotonic() - began
    expected = told(load_report(whole))

    moments = random.Random(0)
    cut = submit(verb, request, project)
    before: dict[str, Any] = {}
    kills = 0
    while kills < KILLS and not wait(cut, moments.uniform(0.1, 0.4) * longest):
        worker = cut.read_worker()
        if worker is not None:
            os.kill(worker.pid, signal.SIGKILL)
        assert wait(cut, 60)
        now = finished(cut)
        assert before.items() <= now.items(), "what was finished was lost or done again"
        before, kills = now, kills + 1
        resume(cut)
    assert kills >= 3
    assert wait(cut)
    assert read_state(cut).status == "done", read_state(cut)
    assert told(load_report(cut)) == expected
    assert before.items() <= finished(cut).items()
