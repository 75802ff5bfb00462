"""A real run outlives its client and its server; a run whose worker is killed says so, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mcp import Client, StdioServerParameters

from omgoptim.jobs.folder import RunFolder, find_run
from omgoptim.jobs.states import ENDED, list_runs, load_report, read_state

ROOT = Path(__file__).parents[1]
NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 256), nn.Linear(256, 4)
    def forward(self, x): return self.head(self.body(x).relu())
def load(split): return [(torch.randn(16, 16), torch.randint(0, 4, (16,))) for _ in range(16)]
"""
MODEL = {"model": "net.py:Net", "data": "net.py:load", "timing": "quick"}
ARGUMENTS = MODEL | {"scheme": "dynamic", "max_quality_drop": 1}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def server(project: Path) -> StdioServerParameters:
    ours = {"PYTHONPATH": str(ROOT), "OMGOPTIM_PROJECT": str(project), "OMGOPTIM_PYTHON": sys.executable}
    return StdioServerParameters(command=sys.executable, args=["-m", "omgoptim.server"], env=dict(os.environ) | ours)


def until(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    """Wait for a condition that another process brings about; failing is the only use of the clock."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen in time")
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def newest(project: Path) -> RunFolder | None:
    states = list_runs(project)
    return find_run(project, states[0].run_id) if states else None


def begun(project: Path) -> bool:
    folder = newest(project)
    return folder is not None and read_state(folder).progress is not None


def servers_of(project: Path) -> list[psutil.Process]:
    own = psutil.Process().children(recursive=True)
    return [process for process in own if "omgoptim.server" in " ".join(process.cmdline())]


async def test_a_killed_server_takes_no_run_with_it_and_a_new_one_finds_the_report(project: Path) -> None:
    async with Client(server(project), mode="legacy") as client:
        started = await client.call_tool("quantize", {**ARGUMENTS, "wait_s": 0})
        run_id = started.structured_content["run_id"]
        for process in servers_of(project):
            process.kill()
    folder = find_run(project, run_id)
    until(lambda: read_state(folder).status in ENDED)
    assert read_state(folder).status == "done"
    async with Client(server(project), mode="auto") as client:
        shown = await client.call_tool("runs", {"action": "show", "run_id": run_id})
    assert not shown.is_error
    assert shown.structured_content["outcome"] == load_report(folder).outcome


@pytest.mark.slow
async def test_a_worker_killed_while_it_measures_fails_the_run_and_the_next_call_works(project: Path) -> None:
    async with Client(server(project), mode="auto") as client:
        started = await client.call_tool("quantize", {**ARGUMENTS, "timing": "careful", "wait_s": 0})
        folder: RunFolder = find_run(project, started.structured_content["run_id"])
        until(lambda: (read_state(folder).progress or 0) >= 0.35)  # from here on it measures
        worker = psutil.Process(read_state(folder).pid)
        measuring = worker.children(recursive=True)
        worker.send_signal(signal.SIGKILL)
        until(lambda: read_state(folder).status == "failed", limit_s=10.0)
        error = read_state(folder).error
        assert error is not None
        assert "worker died" in error["what"]
        until(lambda: not any(map(alive, measuring)), 30.0)
        left = {path.name for path in folder.path.iterdir()}
        assert not left & {"artifact", "work", "report.json"}
        again = await client.call_tool("profile", MODEL)
        while again.structured_content.get("status") in ("running", "queued", "starting"):
            again = await client.call_tool("runs", again.structured_content["next_steps"][0]["arguments"])
    assert not again.is_error
    assert again.structured_content["outcome"] == "ok"


def test_a_client_that_is_interrupted_cancels_its_run(project: Path) -> None:
    command = [sys.executable, "-m", "omgoptim.cli", "quantize", "net.py:Net", "--data", "net.py:load"]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMGOPTIM_PYTHON": sys.executable}
    client = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    until(lambda: begun(project))
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=30)
    assert client.returncode == 130
    assert b"cancel" in said
    assert list_runs(project)[0].status == "cancelled"
