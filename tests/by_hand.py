"""A project with runs that were written by hand, for the tests of the interfaces."""

from __future__ import annotations

import sys
from pathlib import Path

from omgoptim.errors import ModelError
from omgoptim.jobs.folder import RunFolder, Submission, new_run
from omgoptim.jobs.processes import this_process
from omgoptim.jobs.states import as_done, as_failed
from omgoptim.jobs.storage import now
from omgoptim.reports import EfficiencyReport, RunState

REPORTS = Path(__file__).parent / "render" / "reports"

SLEEPER = "import time\n\ndef build():\n    print('building', flush=True)\n    time.sleep(600)\n"
"""A model file that never comes back."""


def report(name: str = "quantized", **changes: object) -> EfficiencyReport:
    stored = EfficiencyReport.model_validate_json((REPORTS / f"{name}.json").read_text(encoding="utf-8"))
    return stored.model_copy(update=changes)


def finished_run(project: Path, answer: EfficiencyReport) -> RunFolder:
    """A run folder as a worker leaves it."""
    folder, state = _begun(project, answer.verb)
    folder.write_report(answer.model_copy(update={"run_id": folder.id}))
    folder.html_file.write_text("<!doctype html>", encoding="utf-8")
    folder.write_state(as_done(state, answer))
    return folder


def failed_run(project: Path) -> RunFolder:
    folder, state = _begun(project, "profile")
    folder.write_state(as_failed(state, ModelError("the model\x1b[31m broke", "a reason", "a way out")))
    return folder


def running_run(project: Path) -> RunFolder:
    """A run whose worker is this process, so that it counts as alive."""
    folder, _ = _begun(project, "profile")
    folder.write_worker(this_process())
    return folder


def _begun(project: Path, verb: str) -> tuple[RunFolder, RunState]:
    folder = new_run(project, verb)
    request = {"model": "net.py:build", "inputs": ["2x3"]}
    folder.write_request(Submission(verb, request, project, sys.executable, "the test", "3"))
    time = now()
    state = RunState(
        run_id=folder.id,
        verb=verb,
        status="running",
        stage="measuring",
        progress=0.4,
        eta_s=12.0,
        started=time,
        updated=time,
        folder=str(folder.path),
        model="net.py:build",
    )
    folder.write_state(state)
    return folder, state
