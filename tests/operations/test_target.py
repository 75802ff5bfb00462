"""Whole runs that measure on a target: a real SSH server on the loopback interface."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ssh_server import Server, running_server

import omgoptim
from omgoptim.errors import ArtifactError, RunError, SetupError
from omgoptim.measure import timing
from omgoptim.measure.launch import Launch
from omgoptim.measure.target import client
from omgoptim.measure.target.connection import CONFIG_VARIABLE
from omgoptim.models.manifest import PROGRAM
from omgoptim.reports import EfficiencyReport

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COMMON = {"data": "net.py:load", "timing": "quick", "samples": 200}


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("sshd")) as server:
        monkeypatch.setenv(CONFIG_VARIABLE, str(server.config))
        yield server


def program_of(report: EfficiencyReport) -> str:
    assert report.artifact is not None
    return hashlib.sha256((Path(report.artifact.path) / PROGRAM).read_bytes()).hexdigest()


def check_where(report: EfficiencyReport, server: Server) -> None:
    assert report.environment.target is not None
    assert report.environment.target.address == server.url
    assert report.environment.target.versions["onnxruntime"]
    assert f"Measured on {server.url}: " in report.summary
    assert {one.measured_on for one in (report.before, report.after) if one is not None} == {server.url}
    assert f"--target {server.url}" in report.repeat
    assert report.next_steps or report.verb == "compare"
    assert all(step.arguments["target"] == server.url and server.url in step.command for step in report.next_steps)
    assert server.gone()


def test_profile_measures_the_float_program_there(project: Path, server: Server, digits) -> None:
    report = omgoptim.profile("net.py:net", checkpoint="net.pt", target=server.url, **COMMON)
    check_where(report, server)
    assert report.before is not None
    assert report.before.runtime == "onnxruntime"
    scope: dict = {}
    exec((project / "net.py").read_text(), scope)
    net = scope["net"]()
    net.load_state_dict(torch.load(project / "net.pt", weights_only=True))
    images, classes = (part[:200] for part in digits)
    accuracy = (net.eval()(images).argmax(1) == classes).double().mean().item()
    assert report.before.quality == pytest.approx(accuracy, abs=0.006)  # one sample that rounds differently
    assert (report.before.latency_ms_p50 or 0) > 0
    assert (report.before.peak_memory_bytes or 0) > 0
    assert {layer.path for layer in report.layers} >= {"0", "3", "8"}


@pytest.mark.slow
def test_quantize_gives_the_artifact_and_the_quality_of_a_local_run(project: Path, server: Server) -> None:
    given = {"checkpoint": "net.pt", "scheme": "static", "runtime": "onnxruntime", **COMMON}
    here = omgoptim.quantize("net.py:net", **given)
    there = omgoptim.quantize("net.py:net", target=server.url, **given)
    check_where(there, server)
    assert program_of(there) == program_of(here)
    assert there.after is not None
    assert here.after is not None
    assert there.after.quality == here.after.quality
    assert there.before is not None
    assert there.before.runtime == "onnxruntime"  # float32 there, where there is no torch
    assert there.coverage is not None


@pytest.mark.slow
def test_the_same_launches_are_measured_there_as_here(
    project: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an ONNX file, so that the original is the same: from a torch model it is another one there."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(module.eval(), (torch.zeros(2, 1, 8, 8),), "net.onnx", dynamo=True, dynamic_shapes=(batch,))
    made: list[tuple[int, Any, Any]] = []
    here, there = timing.run_launch, client.Target.launch

    def note(launch: Launch) -> Launch:
        made.append((len(launch.artifacts), launch.parts, launch.plan))
        return launch

    monkeypatch.setattr(timing, "run_launch", lambda launch: here(note(launch)))
    monkeypatch.setattr(client.Target, "launch", lambda target, launch: there(target, note(launch)))
    launches = []
    for target in (None, server.url):
        omgoptim.quantize("net.onnx", scheme="static", runtime="onnxruntime", target=target, **COMMON)
        launches.append(list(made))
        made.clear()
    assert launches[0] == launches[1]
    assert len(launches[0]) > 1  # screening, and the finalists


@pytest.mark.slow
def test_prune_and_compare_measure_there(project: Path, server: Server) -> None:
    pruned = omgoptim.prune(
        "net.py:net", checkpoint="net.pt", method="structured", target=server.url, epochs=1, **COMMON
    )
    check_where(pruned, server)
    assert pruned.after is not None
    assert pruned.after.runtime == "onnxruntime"
    again = omgoptim.quantize(pruned.run_id, scheme="dynamic", runtime="onnxruntime", **COMMON)
    compared = omgoptim.compare(pruned.run_id, again.run_id, target=server.url, **COMMON)
    check_where(compared, server)


@pytest.mark.slow
def test_compare_refuses_a_module_there(project: Path, server: Server) -> None:
    made = omgoptim.prune("net.py:net", checkpoint="net.pt", method="magnitude", epochs=0, **COMMON)
    with pytest.raises((SetupError, ArtifactError), match="cannot be measured on a target"):
        omgoptim.compare(made.run_id, made.run_id, target=server.url, **COMMON)


@pytest.mark.slow
def test_a_run_whose_target_is_gone_fails_and_keeps_its_launches(
    project: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = client.Target.launch

    def cut(self, *arguments):
        result = launch(self, *arguments)
        server.env.write_text("exit 1\n")
        server.kill_processes()
        return result

    monkeypatch.setattr(client.Target, "launch", cut)
    monkeypatch.setattr(client.Target, "reconnect_s", 0.5)
    with pytest.raises(RunError, match="was lost") as raised:
        omgoptim.profile(
            "net.py:net", checkpoint="net.pt", target=server.url, data="net.py:load", timing="standard", samples=50
        )
    assert "resume" in raised.value.fix
    [kept] = project.glob(".omgoptim/runs/*/measured.jsonl")
    assert json.loads(kept.read_text().splitlines()[0])["launch"][0]["p50"] > 0


def test_a_target_that_cannot_be_reached_ends_the_run_before_anything_is_loaded(project: Path, server: Server) -> None:
    server.env.write_text("exit 1\n")
    (project / "net.py").write_text("raise ValueError('it was loaded')")
    with pytest.raises(SetupError, match="cannot be reached"):
        omgoptim.profile("net.py:net", target=server.url, **COMMON)
