"""An interrupted step of a run resumes in its own folder, and a finished step is not repeated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omgoptim.errors import ModelError
from omgoptim.jobs.folder import RunFolder, Submission, WorkerProcess, new_run
from omgoptim.jobs.states import as_cancelled, as_failed, read_state
from omgoptim.jobs.step_runs import StepRuns, cancel_steps
from omgoptim.jobs.worker import execute
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import Live
from omgoptim.reports import EfficiencyReport, Environment
from omgoptim.requests import Request, parse

KEY = "ab" * 32
SPAN = (0.0, 1.0)


class Work:
    """Stands for the verb: fails a given number of times, then gives a report."""

    def __init__(self, failures: int = 0) -> None:
        self.done: list[str] = []
        self.failures = failures

    def __call__(self, folder: RunFolder, _operation: Callable[..., Any], *, owns_process: bool) -> None:
        def verb(_verb: str, _request: Request, context: RunContext) -> EfficiencyReport:
            self.done.append(context.run_id)
            if len(self.done) <= self.failures:
                raise ModelError("it broke")
            environment = Environment(cpu="c", threads=1, python="p", versions={}, seed=0)
            return EfficiencyReport(
                outcome="ok", summary="it worked", verb="prune", run_id=context.run_id, request={},
                environment=environment, repeat="r",
            )  # fmt: skip

        execute(folder, verb, owns_process=owns_process)


@pytest.fixture
def request_() -> Request:
    return parse("prune", {"model": "net.py:net"})


def steps_of(folder: RunFolder, work: Work) -> StepRuns:
    asked = Submission("optimize", {"model": "net.py:net"}, folder.path.parents[2], sys.executable, "a test", "3.11")
    return StepRuns(folder, asked, lambda *_: None, work)


def runs_beside(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.path.parent.iterdir() if path != folder.path)


def as_left(step: RunFolder, how: str) -> None:
    """Leave the files of a run as an end of that kind leaves them."""
    state = step.stored_state()
    step.report_file.unlink()
    if how == "killed":
        step.write_worker(WorkerProcess(2**22 + 1, 1.0))
        step.write_state(state.model_copy(update={"status": "running", "stage": "training", "pid": 2**22 + 1}))
    elif how == "killed before it began":
        step.worker_file.unlink()
        step.write_state(state.model_copy(update={"status": "starting"}))
    elif how == "cancelled":
        step.write_state(as_cancelled(state))
    else:
        step.write_state(as_failed(state, ModelError("it broke")))


@pytest.mark.parametrize("how", ["killed", "killed before it began", "cancelled", "failed"])
def test_a_step_that_was_not_finished_goes_on_in_its_own_folder(tmp_path: Path, request_: Request, how: str) -> None:
    parent, work = new_run(tmp_path, "optimize"), Work()
    first = steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)
    as_left(RunFolder(first.folder), how)
    again = steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)
    assert again.run_id == first.run_id
    assert work.done == [first.run_id] * 2
    assert runs_beside(parent) == [first.run_id]
    assert read_state(RunFolder(again.folder)).status == "done"


def test_a_finished_step_is_read_and_not_done_again(tmp_path: Path, request_: Request) -> None:
    parent, work = new_run(tmp_path, "optimize"), Work()
    first = steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)
    again = steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)
    assert (again.run_id, again.report.summary) == (first.run_id, "it worked")
    assert work.done == [first.run_id]


def test_another_key_is_another_run(tmp_path: Path, request_: Request) -> None:
    parent, work = new_run(tmp_path, "optimize"), Work()
    first = steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)
    other = steps_of(parent, work)("cd" * 32, "prune", request_, Live(), SPAN)
    assert first.run_id != other.run_id


def test_a_step_that_fails_raises_what_it_failed_with(tmp_path: Path, request_: Request) -> None:
    parent, work = new_run(tmp_path, "optimize"), Work(failures=1)
    with pytest.raises(ModelError, match="it broke"):
        steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)


@pytest.mark.parametrize("named", ["../elsewhere", "", "no-such-run", "."])
def test_a_name_that_is_no_run_beside_this_one_begins_a_new_step(tmp_path: Path, request_: Request, named: str) -> None:
    parent, work = new_run(tmp_path, "optimize"), Work()
    steps = parent.checkpoints / "steps"
    steps.mkdir(parents=True)
    (steps / KEY).write_text(named)
    found = steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)
    assert work.done == [found.run_id]
    assert (steps / KEY).read_text() == found.run_id


def test_the_unfinished_step_of_a_cancelled_run_is_cancelled_and_a_finished_one_stays_done(
    tmp_path: Path, request_: Request
) -> None:
    parent, work = new_run(tmp_path, "optimize"), Work()
    done = steps_of(parent, work)(KEY, "prune", request_, Live(), SPAN)
    cut = steps_of(parent, work)("cd" * 32, "prune", request_, Live(), SPAN)
    as_left(RunFolder(cut.folder), "killed")
    cancel_steps(parent)
    assert RunFolder(cut.folder).stored_state().status == "cancelled"
    assert RunFolder(done.folder).stored_state().status == "done"
