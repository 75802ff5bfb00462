from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from omgoptim.errors import RunError
from omgoptim.jobs.folder import RunFolder, WorkerProcess, new_run
from omgoptim.jobs.processes import start_time_of, this_process
from omgoptim.jobs.states import list_runs, load_report, read_state
from omgoptim.jobs.storage import now
from omgoptim.reports import RunState

Launch = Callable[..., RunFolder]
Ended = Callable[[RunFolder], RunState]

LONG_AGO = "2026-01-01T00:00:00.000+00:00"


@pytest.fixture
def gone() -> WorkerProcess:
    """A process that was, and is no more."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        born = start_time_of(process.pid)
    assert born is not None
    return WorkerProcess(process.pid, born)


def running(project: Path, status: str = "running", started: str = LONG_AGO, **more: object) -> RunFolder:
    folder = new_run(project, "profile")
    state = {"run_id": folder.id, "verb": "profile", "status": status, "started": started, "updated": started}
    folder.write_state(RunState.model_validate({**state, "folder": str(folder.path), **more}))
    return folder


@pytest.mark.parametrize("status", ["starting", "queued", "running"])
def test_a_run_whose_worker_is_gone_has_failed(project: Path, gone: WorkerProcess, status: str) -> None:
    folder = running(project, status, stage="calibrating", pid=gone.pid)
    folder.write_worker(gone)
    folder.log_file.write_bytes(b"\x1b[31mred\x1b[0m\nbell \x07 and \xff\n" + b"last line\r\n")
    state = read_state(folder)
    assert state.status == "failed"
    assert state.error is not None
    assert state.error["kind"] == "RunError"
    assert "calibrating" in state.error["why"]
    assert state.error["log"] == "red\nbell \\x07 and \ufffd\nlast line"
    assert folder.stored_state() == state


def test_a_run_is_alive_as_long_as_its_worker_is(project: Path) -> None:
    folder = running(project)
    folder.write_worker(this_process())
    assert read_state(folder).status == "running"


def test_another_process_with_the_workers_number_is_not_the_worker(project: Path) -> None:
    folder = running(project)
    folder.write_worker(WorkerProcess(os.getpid(), this_process().born - 1))
    assert read_state(folder).status == "failed"


def test_a_run_whose_lock_is_held_is_not_declared_dead(project: Path, gone: WorkerProcess) -> None:
    folder = running(project)
    folder.write_worker(gone)
    with FileLock(folder.worker_lock):  # its worker lives where its process can't be seen, in a container say
        assert read_state(folder).status == "running"
    assert read_state(folder).status == "failed"


def test_a_run_that_never_got_a_process_is_starting_for_a_while_and_then_failed(project: Path) -> None:
    assert read_state(running(project, "starting", now())).status == "starting"
    assert read_state(running(project, "starting", LONG_AGO)).status == "failed"


def test_a_folder_without_a_state_is_a_run_that_did_not_start(project: Path) -> None:
    folder = new_run(project, "quantize")
    assert (read_state(folder).status, read_state(folder).verb) == ("starting", "quantize")
    os.utime(folder.path, (0, 0))
    assert read_state(folder).status == "failed"


def test_runs_are_listed_newest_first_and_their_truth_is_told(project: Path, gone: WorkerProcess) -> None:
    old = running(project, "done", "2026-01-01T00:00:00.000+00:00")
    new = running(project, "running", "2026-03-01T00:00:00.000+00:00")
    middle = running(project, "cancelled", "2026-02-01T00:00:00.000+00:00")
    new.write_worker(gone)
    states = list_runs(project)
    assert [state.run_id for state in states] == [new.id, middle.id, old.id]
    assert [state.status for state in states] == ["failed", "cancelled", "done"]
    assert list_runs(project / "nothing-here") == []


def test_a_run_that_has_not_ended_has_no_report_and_says_how_to_wait(project: Path) -> None:
    folder = running(project, stage="timing")
    folder.write_worker(this_process())
    with pytest.raises(RunError, match="has not ended") as caught:
        load_report(folder)
    assert f"omgoptim runs wait {folder.id}" in caught.value.fix


def test_a_damaged_report_is_an_error(start: Launch, ended: Ended) -> None:
    folder = start("return report(context)")
    ended(folder)
    folder.report_file.write_text("{")
    with pytest.raises(RunError, match="missing or damaged"):
        load_report(folder)
