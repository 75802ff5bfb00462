"""Real runs in real processes: the worker as it is, with a small verb in the place of the operations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from omgoptim.bootstrap import IMPORT_OMGOPTIM
from omgoptim.jobs.actions import cancel
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.follow import follow
from omgoptim.jobs.interpreter import Interpreter
from omgoptim.jobs.submit import launch
from omgoptim.reports import RunState
from omgoptim.requests import parse

VERBS = """
import json, os, signal, subprocess, sys
from pathlib import Path
from omgoptim.errors import ModelError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.worker import execute
from omgoptim.reports import EfficiencyReport, Environment

def report(context):
    environment = Environment(cpu="c", threads=1, python=context.python, versions={}, seed=0)
    return EfficiencyReport(
        outcome="ok", summary="it worked", verb="profile", run_id=context.run_id, request={},
        environment=environment, repeat="omgoptim profile net.py:build",
    )

def hold(context, stage="holding"):
    context.progress(stage, 0.5)
    while True:
        signal.pause()

def child(*options, code="import signal\\nwhile True: signal.pause()", **popen):
    return subprocess.Popen([sys.executable, "-c", code], **popen)
"""
RUN = "\nexecute(RunFolder(Path(sys.argv[2])), run_verb)\n"

LONG_S = 60.0
"""Far longer than anything here takes: what hangs fails."""

Launch = Callable[..., RunFolder]


@pytest.fixture(autouse=True)
def _own_queues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device queues of a test's own, so that tests do not wait for each other."""
    monkeypatch.setenv("OMGOPTIM_LOCK_DIR", str(tmp_path / "queues"))
    monkeypatch.setenv("OMGOPTIM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder.resolve()


@pytest.fixture
def this_python() -> Interpreter:
    return Interpreter(Path(sys.executable), "the test", "{}.{}.{}".format(*sys.version_info[:3]), ())


@pytest.fixture
def program() -> Callable[[str], str]:
    """A worker's program whose verb has the given body (of `def run_verb(verb, request, context)`)."""

    def compose(body: str) -> str:
        lines = "\n".join("    " + line for line in body.splitlines())
        return f"{VERBS}\ndef run_verb(verb, request, context):\n{lines}\n{RUN}"

    return compose


@pytest.fixture
def start(project: Path, this_python: Interpreter, program: Callable[[str], str]) -> Iterator[Launch]:
    """Launch a run whose verb has the given body; what still runs at the end of the test is cancelled."""
    started = []

    def launch_body(body: str, verb: str = "profile", **arguments: object) -> RunFolder:
        request = parse(verb, {"model": "net.py:build", **arguments})
        started.append(launch(verb, request, project, this_python, IMPORT_OMGOPTIM + program(body)))
        return started[-1]

    yield launch_body
    for folder in started:
        cancel(folder, grace_s=0)


@pytest.fixture
def ended() -> Callable[[RunFolder], RunState]:
    """The last state of a run, when it has ended."""

    def wait(folder: RunFolder) -> RunState:
        *_, last = follow(folder, LONG_S, interval_s=0.05)
        assert last.status in ("done", "failed", "cancelled"), folder.log_file.read_text()
        return last

    return wait


@pytest.fixture
def in_stage() -> Callable[[RunFolder, str], RunState]:
    """The state of a run as soon as its stage holds some words."""

    def wait(folder: RunFolder, words: str) -> RunState:
        for state in follow(folder, LONG_S, interval_s=0.02):
            if words in state.stage:
                return state
        raise AssertionError(f"{words!r} was not reached: {folder.log_file.read_text()}")

    return wait


@pytest.fixture
def exists() -> Callable[[int], bool]:
    """Return True if a process lives; a zombie does not."""

    def look(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return look
