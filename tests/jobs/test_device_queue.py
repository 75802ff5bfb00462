from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from omgoptim.jobs.device_queue import DeviceQueue, Ticket, Wait, device_of, queue_folder
from omgoptim.requests import parse

HOLD = """
import sys
from omgoptim.jobs.device_queue import DeviceQueue
with DeviceQueue(sys.argv[1], sys.argv[2]).turn(lambda wait: print(wait.ahead, flush=True)):
    print("measures", flush=True)
    sys.stdin.read()
"""


class Run(subprocess.Popen[str]):
    """A process that asks for its turn, says `measures` when it has it, and keeps it until its input ends."""

    def __init__(self, device: str, run_id: str) -> None:
        command = [sys.executable, "-c", HOLD, device, run_id]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def said(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().strip()

    def until_said(self, words: str) -> None:
        while (line := self.said()) != words:
            assert line, "the process ended"

    def end(self) -> None:
        assert self.stdin is not None
        self.stdin.close()
        self.wait()


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        run.kill()
        run.wait()
        for pipe in (run.stdin, run.stdout):
            assert pipe is not None
            pipe.close()


def test_one_run_measures_on_a_device_and_its_death_frees_it(runs: list[Run]) -> None:
    first, other = Run("cpu", "first"), Run("cuda", "other")
    runs += [first, other]
    first.until_said("measures")
    other.until_said("measures")
    second = Run("cpu", "second")
    runs.append(second)
    assert second.said() == "0"  # waits, and nobody else waits before it
    first.kill()
    first.wait()
    second.until_said("measures")


def test_turns_come_in_the_order_of_asking(runs: list[Run]) -> None:
    names = ("first", "second", "third")
    for ahead, name in enumerate(names):
        run = Run("cpu", name)
        runs.append(run)
        run.until_said("measures" if ahead == 0 else str(ahead - 1))
    first, second, third = runs
    first.end()
    second.until_said("measures")
    assert DeviceQueue("cpu", "me").measured_by() is not None
    third.until_said("0")
    second.end()
    third.until_said("measures")


def test_a_turn_within_a_turn_is_the_same_one() -> None:
    queue = DeviceQueue("cpu", "me")
    with queue.turn(lambda _wait: pytest.fail("waited for itself")):
        with queue.turn(lambda _wait: pytest.fail("waited for itself")):
            assert queue.measured_by() is None
        other = DeviceQueue("cpu", "other").measured_by()
        assert other is not None
        assert other.run_id == "me"
    assert DeviceQueue("cpu", "other").measured_by() is None


def test_a_run_that_does_not_measure_pauses_while_another_does() -> None:
    measures, works = DeviceQueue("cpu", "measures"), DeviceQueue("cpu", "works")
    waits: list[Wait] = []
    paused = threading.Event()

    def on_wait(wait: Wait) -> None:
        waits.append(wait)
        paused.set()

    with measures.turn(lambda _wait: None):
        thread = threading.Thread(target=works.pause, args=(on_wait,))
        thread.start()
        assert paused.wait(60)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()
    assert waits[0].measuring is not None
    assert waits[0].measuring.run_id == "measures"
    assert works.pause(on_wait) is False


def test_a_run_that_paused_works_for_as_long_before_a_later_run_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("omgoptim.jobs.device_queue.time.time", lambda: clock[0])
    first, works, later = (DeviceQueue("cpu", name) for name in ("first", "works", "later"))
    waits: list[str] = []

    def first_ends(wait: Wait) -> None:
        if clock[0] == 1000.0:
            clock[0] = 1030.0
            turn.__exit__(None, None, None)

    def time_passes(wait: Wait) -> None:
        waits.append(wait.text("cpu"))
        clock[0] += 20.0

    turn = first.turn(lambda _wait: None)
    turn.__enter__()
    assert works.pause(first_ends)
    assert works.pause(lambda _wait: None) is False  # works on
    with later.turn(time_passes):
        assert clock[0] == 1070.0
        assert works.measured_by() is not None
    assert waits == [f"waiting for cpu: run works, which had to pause, goes on for {left} s" for left in (30, 10)]


def test_a_run_that_paused_may_measure_in_its_own_time_slice() -> None:
    first, works = DeviceQueue("cpu", "first"), DeviceQueue("cpu", "works")
    turn = first.turn(lambda _wait: None)
    turn.__enter__()
    assert works.pause(lambda _wait: turn.__exit__(None, None, None))
    with works.turn(lambda _wait: pytest.fail("waited for itself")):
        assert not list(queue_folder().glob("*.ticket"))


def test_the_ticket_of_a_process_that_is_gone_keeps_nobody_waiting() -> None:
    folder = queue_folder()
    dead = folder / "cpu.00000000000000000001-1-0.ticket"
    dead.write_text('{"run_id": "gone", "pid": 999999999, "born": 1.0, "since": 0.0}')
    (folder / "cpu.00000000000000000002-1-0.ticket").write_text("not a ticket")
    with DeviceQueue("cpu", "me").turn(lambda _wait: None):
        assert not list(folder.glob("*.ticket"))


def test_a_wait_names_who_measures_and_how_many_are_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omgoptim.jobs.device_queue.time.time", lambda: 112.0)
    holder = Ticket("prune-1", os.getpid(), 1.0, 100.0)
    assert Wait(holder, 0).text("cpu") == "waiting for cpu: run prune-1 has been measuring for 12 s"
    assert Wait(holder, 2).text("cpu") == "waiting for cpu: run prune-1 has been measuring for 12 s, 2 more are ahead"
    assert Wait(None, 1).text("cuda") == "waiting for cuda: the next run is about to measure, 1 more is ahead"


def test_the_queue_of_a_machine_does_not_depend_on_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMGOPTIM_LOCK_DIR")
    before = queue_folder()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert queue_folder() == before


@pytest.mark.parametrize(
    ("verb", "arguments", "device"),
    [
        ("profile", {"model": "m.onnx"}, "cpu"),
        ("profile", {"model": "m.onnx", "device": "cuda"}, "cuda"),
        ("compare", {"a": "x", "b": "y"}, "cpu"),
        ("quantize", {"model": "m.onnx"}, "cpu"),
        ("quantize", {"model": "m.onnx", "plan": True}, None),
    ],
)
def test_what_measures_takes_a_device_and_a_plan_takes_none(
    verb: str, arguments: dict[str, object], device: str | None
) -> None:
    assert device_of(parse(verb, arguments)) == device
