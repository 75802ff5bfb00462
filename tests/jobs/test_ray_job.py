"""A run as a Ray job: the project is sent, the run is done from the copy, and its files come back.

The head of these tests answers the requests of Ray's own client and starts the entrypoint in what it was sent; the one
of the last test is Ray's.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import types
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import omgoptim
from omgoptim.errors import ModelError, RequestError, RunError
from omgoptim.models.security.file_integrity import is_signed
from omgoptim.operations.ray_job import RESULT, result_lines
from omgoptim.server.permissions import resolve_call

pytest.importorskip("ray")

NET = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

def load(split):
    generator = torch.Generator().manual_seed(("train", "calibration", "eval").index(split))
    x = torch.randn(200, 8, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))
"""

QUICK: dict[str, Any] = {"epochs": 1, "timing": "quick", "samples": 50, "threads": 1, "max_quality_drop": 1.0}


class Head(ThreadingHTTPServer):
    """Answers what Ray's client of the Jobs API asks, one job at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.packages: dict[str, bytes] = {}
        self.job: subprocess.Popen[bytes] | None = None
        self.submitted: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def submit(self, asked: dict[str, Any]) -> None:
        self.submitted.append(asked)
        environment, work = asked["runtime_env"], self.folder / "working_dir"
        for place, uri in [(work, environment["working_dir"]), (self.folder / "modules", environment["py_modules"][0])]:
            zipfile.ZipFile(io.BytesIO(self.packages[uri.rpartition("/")[2]])).extractall(place)
        python, *words = shlex.split(asked["entrypoint"])
        assert python == "python"
        with (self.folder / "log").open("wb") as log:
            environ = os.environ | {"PYTHONPATH": str(self.folder / "modules")}
            self.job = subprocess.Popen([sys.executable, *words], cwd=work, stdout=log, stderr=log, env=environ)

    def status(self) -> str:
        assert self.job is not None
        code = self.job.poll()
        return "RUNNING" if code is None else "SUCCEEDED" if code == 0 else "STOPPED" if code < 0 else "FAILED"


class _Answers(BaseHTTPRequestHandler):
    server: Head

    def do_GET(self) -> None:
        head, name = self.server, self.path.rpartition("/")[2]
        if self.path == "/api/version":
            self._answer({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
        elif self.path.startswith("/api/packages/"):
            self._answer({}, 200 if name in head.packages else 404)
        elif head.job is None:
            self._answer({}, 404)
        elif name == "logs":
            self._answer({"logs": (head.folder / "log").read_text()})
        else:
            self._answer({"type": "SUBMISSION", "status": head.status(), "entrypoint": ""})

    def do_PUT(self) -> None:
        self.server.packages[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        if self.path.endswith("/stop"):
            if self.server.job is not None:
                self.server.job.kill()
            self._answer({"stopped": True})
            return
        asked = json.loads(self._body())
        self.server.submit(asked)
        self._answer({"job_id": asked["submission_id"], "submission_id": asked["submission_id"]})

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, record: dict[str, Any], code: int = 200) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(record).encode())


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    (tmp_path / "head").mkdir()
    server = Head(tmp_path / "head")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    if server.job is not None:
        server.job.kill()
        server.job.wait()


@pytest.fixture(autouse=True)
def _client_without_tailing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray's client work where aiohttp, with which it only tails logs, is not installed."""
    if importlib.util.find_spec("aiohttp") is None:
        monkeypatch.setitem(sys.modules, "aiohttp", types.ModuleType("aiohttp"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


@pytest.mark.slow
def test_a_run_is_done_from_the_copy_that_was_sent_and_comes_back_as_this_users(here: Path, head: Head) -> None:
    report = omgoptim.distill("net.py:net", "narrow", data="net.py:load", on=head.url, output="small", **QUICK)
    run = here / ".omgoptim" / "runs" / report.run_id
    [asked] = head.submitted
    assert asked["submission_id"] == report.run_id
    record = json.loads(base64.urlsafe_b64decode(asked["entrypoint"].split()[-1]))
    assert (record["request"]["on"], record["request"]["output"]) == ("ray", None)
    assert (head.folder / "working_dir" / ".omgoptim" / "runs" / report.run_id / "report.json").exists()
    assert str(head.folder) not in report.model_dump_json(exclude={"environment", "warnings"})
    assert is_signed("artifact", json.loads((run / "artifact" / "manifest.json").read_text()))
    assert omgoptim.open_artifact(here / "small") is not None
    stages = [json.loads(line).get("stage", "") for line in (run / "events.jsonl").read_text().splitlines()]
    assert any(stage.startswith("sending the project: 0.0 MB in 1 files") for stage in stages)
    assert any(stage.startswith("on the cluster: ") for stage in stages)


@pytest.mark.slow
def test_what_a_run_raises_on_the_cluster_is_raised_here(here: Path, head: Head) -> None:
    (here / "net.py").write_text(NET.replace("def net():", "def net():\n    raise ValueError('no weights')"))
    with pytest.raises(omgoptim.OmgoptimError, match="net"):
        omgoptim.distill("net.py:net", "narrow", data="net.py:load", on=head.url, **QUICK)


def test_objects_of_this_process_are_refused_before_anything_is_sent(here: Path, head: Head) -> None:
    import torch

    with pytest.raises(RequestError, match="the Python object given as module cannot be sent"):
        omgoptim.distill(torch.nn.Linear(2, 2), "narrow", data="net.py:load", on=head.url, **QUICK)
    assert head.packages == {}


def test_a_log_that_was_cut_is_no_result(tmp_path: Path) -> None:
    from omgoptim.operations.context import RunContext
    from omgoptim.operations.ray_job import fetched

    folder = tmp_path / "elsewhere"
    (folder / "artifact").mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    (folder / "artifact" / "model.onnx").write_bytes(os.urandom(20_000))
    lines = list(result_lines(folder, "/here", str(folder)))
    assert len(lines) > 3
    context = RunContext(tmp_path / "here", "distill-1", tmp_path, "", "", lambda _stage, _done: None)
    with pytest.raises(RunError, match="ended without a result"):
        fetched("\n".join(lines[:-1]), context)
    failed = "omgoptim-failed " + json.dumps(ModelError("the model is gone").to_dict())
    with pytest.raises(ModelError, match="the model is gone"):
        fetched(failed, context)
    assert not (tmp_path / "here").exists()
    assert lines[0].startswith(RESULT)


def test_an_agent_sends_the_project_only_to_the_head_that_the_user_named(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omgoptim.requests import parse

    monkeypatch.setenv("OMGOPTIM_PROJECT", str(here))
    asked = parse("optimize", {"model": "net.py:net", "on": "http://head:8265"})
    with pytest.raises(RequestError, match="the project cannot be sent to http://head:8265"):
        resolve_call(asked)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265/")
    assert resolve_call(asked)[1] == asked


@pytest.mark.slow
def test_a_head_of_ray_itself_does_the_run(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp_cors", reason="the head's dashboard is in ray[default]")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    ports = free_ports(2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--dashboard-agent-listen-port=0"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        command += ["--include-dashboard=true", "--disable-usage-stats", f"--temp-dir={short}"]
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert started.stdout is not None
        try:
            assert any("Ray runtime started" in line for line in started.stdout)
            words = [sys.executable, "-m", "omgoptim.cli", "distill", "net.py:net", "--student", "narrow"]
            words += ["--on", f"http://127.0.0.1:{ports[1]}", "--data", "net.py:load", "--epochs", "1", "--timing"]
            words += ["quick", "--samples", "50", "--threads", "1", "--max-quality-drop", "1", "--json"]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr + done.stdout
            assert omgoptim.open_artifact(json.loads(done.stdout)["run_id"]) is not None
        finally:
            started.terminate()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
            started.stdout.close()


def free_ports(number: int) -> list[int]:
    """Return ports on which nothing listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
