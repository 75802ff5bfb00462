"""Tasks in processes of this machine: results, lost workers, errors, and what is left at the end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from omgoptim.errors import ModelError, RunError
from omgoptim.executors import Task
from omgoptim.executors.local import LocalExecutor


def task(folder: Path, name: str, number: int, **more: Any) -> Task:
    payload = {"number": number, "log": str(folder / "log")} | more
    return Task(f"sample_tasks:{name}", payload, folder / f"{number:03d}")


def starts(folder: Path) -> list[int]:
    return sorted(int(line.split()[0]) for line in (folder / "log").read_text().splitlines())


def test_every_task_ends_once_and_leaves_only_its_folder(tmp_path: Path) -> None:
    executor = LocalExecutor(2, tmp_path)
    futures = [executor.submit(task(tmp_path, "square", number)) for number in range(6)]
    assert [future.result(60).folder.name for future in futures] == [f"{number:03d}" for number in range(6)]
    executor.close()
    assert [(tmp_path / f"{number:03d}" / "square").read_text() for number in range(6)] == [
        "0",
        "1",
        "4",
        "9",
        "16",
        "25",
    ]
    assert starts(tmp_path) == list(range(6))
    assert sorted(os.listdir(tmp_path)) == [*(f"{number:03d}" for number in range(6)), "log"]


def test_a_killed_worker_loses_no_task_and_repeats_only_its_own(tmp_path: Path) -> None:
    executor = LocalExecutor(2, tmp_path)
    until = str(tmp_path / "go")
    futures = [executor.submit(task(tmp_path, "waiting", number, until=until)) for number in range(4)]
    while not (tmp_path / "log").exists() or len(starts(tmp_path)) < 2:
        assert not any(future.done() for future in futures)
    number, pid = map(int, (tmp_path / "log").read_text().splitlines()[0].split())
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    results = [future.result(60) for future in futures]
    pids = {result.pid for result in results}
    executor.close()
    assert [result.attempt for result in results] == [2 if at == number else 1 for at in range(4)]
    assert starts(tmp_path) == sorted([*range(4), number])
    assert not any(psutil.pid_exists(each) for each in pids)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_later_attempt_goes_on_from_the_checkpoint_of_the_lost_one(tmp_path: Path) -> None:
    executor = LocalExecutor(1, tmp_path)
    result = executor.submit(task(tmp_path, "resuming", 0)).result(60)
    executor.close()
    assert (result.attempt, (result.folder / "from").read_text()) == (2, "1")
    assert not list(tmp_path.glob("*.checkpoints"))


def test_an_error_of_the_task_is_final_and_a_worker_that_always_dies_is_given_up(tmp_path: Path) -> None:
    executor = LocalExecutor(1, tmp_path)
    with pytest.raises(ModelError, match="no output"):
        executor.submit(task(tmp_path, "refusing", 1)).result(60)
    assert starts(tmp_path) == [1]
    with pytest.raises(RunError, match="lost 3 times") as given_up:
        executor.submit(task(tmp_path, "dying", 2)).result(60)
    assert "signal 9" in given_up.value.why
    executor.close()
    assert starts(tmp_path) == [1, 2, 2, 2]


def test_no_task_of_this_machine_runs_while_something_is_timed(tmp_path: Path) -> None:
    executor = LocalExecutor(1, tmp_path)
    future = executor.submit(task(tmp_path, "waiting", 0, until=str(tmp_path / "go")))
    while not (tmp_path / "log").exists():
        assert not future.done()
    worker = psutil.Process(int((tmp_path / "log").read_text().split()[1]))
    with executor.paused():
        while worker.status() != psutil.STATUS_STOPPED:
            assert worker.is_running()
    (tmp_path / "go").touch()
    assert future.result(60).attempt == 1
    executor.close()
