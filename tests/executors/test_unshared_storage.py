"""A Ray node that does not see the driver's folders: what a task needs travels to it, and its files come back.

The node runs in a mount namespace of its own, in which an empty file system lies over the project.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import omgoptim
from omgoptim.executors import Task
from omgoptim.executors.ray import RayExecutor
from omgoptim.executors.task import WORKER

pytest.importorskip("ray")

UNSHARE = ["unshare", "--mount"] if hasattr(os, "getuid") and os.getuid() == 0 else ["unshare", "-Urm"]


def can_unshare() -> bool:
    try:
        return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    except OSError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_unshare(), reason="no mount namespaces here"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
]

ROOT = Path(__file__).parents[2]

NET = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

def space(trial):
    width = trial.suggest_categorical("width", [8, 16, 32])
    depth = trial.suggest_int("depth", 0, 1)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *[nn.Linear(width, width), nn.ReLU()] * depth,
                         nn.Linear(width, 4))

def load(split):
    generator = torch.Generator().manual_seed(("train", "calibration", "eval").index(split))
    x = torch.randn(400, 8, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))
"""

QUICK: dict[str, Any] = {
    "data": "net.py:load", "timing": "quick", "samples": 50, "threads": 1, "max_quality_drop": 1.0,
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that the only node with CPUs of the cluster of RAY_ADDRESS does not see."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(folder))
    return folder


@pytest.fixture
def elsewhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    start += ["--object-store-memory=100000000"]
    hidden = [*UNSHARE, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(project), *start]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short, ExitStack() as stack:
        head = [*start, "--head", f"--port={address.rpartition(':')[2]}", "--num-cpus=0", f"--temp-dir={short}"]
        for command in ([*head, "--include-dashboard=false"], [*hidden, f"--address={address}", "--num-cpus=2"]):
            process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.callback(ended, process)
            assert process.stdout is not None
            assert any("Ray runtime started" in line for line in process.stdout)
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield


def ended(process: subprocess.Popen[str]) -> None:
    """End a node."""
    process.terminate()
    try:
        process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def test_inputs_travel_to_a_node_that_does_not_see_them_and_its_files_come_back(project: Path, elsewhere: None) -> None:
    (project / "a").mkdir()
    for name, text in (("a/same", "one"), ("same", "two")):
        (project / name).write_text(text)
    executor = RayExecutor(2, project, lambda _stage, _done: None)
    try:
        inputs = {"parent/a/same": project / "a" / "same", "parent/same": project / "same"}
        folder = project / "000"
        result = executor.submit(Task("sample_tasks:copying", {"absent": str(project / "same")}, folder, inputs=inputs))
        assert result.result(120).received_bytes > 0
    finally:
        executor.close()
    assert (folder / "parent" / "a" / "same").read_text() == "one"
    assert (folder / "parent" / "same").read_text() == "two"
    assert (folder / WORKER).is_file()
    assert (folder / "absent").read_text() == "True"


def test_a_search_from_an_artifact_has_the_trials_of_one_process(project: Path, elsewhere: None) -> None:
    parent = omgoptim.distill("net.py:net", "narrow", epochs=3, **QUICK)
    asked = QUICK | {"trials": 3, "epochs": 3, "target_size_mb": 1.0, "proposals": 3}
    alone = omgoptim.search(parent.run_id, "net.py:space", **asked)
    away = omgoptim.search(parent.run_id, "net.py:space", on="ray", workers=2, **asked)
    expected = rungs(project, alone.run_id)
    assert rungs(project, away.run_id) == {name: pytest.approx(each, abs=1e-6) for name, each in expected.items()}
    assert away.delivered == alone.delivered
    assert omgoptim.open_artifact(away.run_id) is not None


def rungs(project: Path, run_id: str) -> dict[str, list[float]]:
    """Qualities at each rung of a search's trials, by configuration."""
    found = {}
    for folder in sorted((project / ".omgoptim" / "runs" / run_id / "search" / "trials").glob("[0-9]" * 5)):
        result = json.loads((folder / "result.json").read_text())
        assert result["outcome"] in ("trained", "stopped"), result
        configuration = json.loads((folder / "spec.json").read_text())["configuration"]
        found[json.dumps(configuration)] = result["rungs"]
    return found


def test_the_compared_steps_of_optimize_are_made_there_and_measured_here(project: Path, elsewhere: None) -> None:
    parent = omgoptim.distill("net.py:net", "narrow", epochs=3, **QUICK)
    asked = QUICK | {"budget_minutes": 60, "runtime": "onnxruntime", "prefer": "size", "max_quality_drop": 0.0}
    report = omgoptim.optimize(parent.run_id, on="ray", workers=2, **asked)
    assert not [step for step in report.steps if step.status == "failed"]
    said = (project / ".omgoptim" / "runs" / report.run_id / "events.jsonl").read_text()
    assert "2 of 2 steps trained by 2 workers" in said
    assert {"prune", "distill"} <= {step.verb for step in report.steps if step.run_id}


def test_the_programs_of_candidates_are_written_there_and_timed_here(project: Path, elsewhere: None) -> None:
    alone = omgoptim.quantize("net.py:net", **QUICK)
    away = omgoptim.quantize("net.py:net", on="ray", workers=2, **QUICK)
    said = (project / ".omgoptim" / "runs" / away.run_id / "events.jsonl").read_text()
    assert "quantized programs on 2 workers" in said
    sizes = [{one.name: one.size_bytes for one in report.candidates} for report in (alone, away)]
    assert sizes[0] == sizes[1]
    assert not [one for one in away.candidates if one.status == "failed"]


def test_the_layers_of_a_sensitivity_analysis_are_measured_there(project: Path, elsewhere: None) -> None:
    asked = QUICK | {"method": "magnitude", "sensitivity": True, "epochs": 0}
    parent = omgoptim.prune("net.py:net", method="magnitude", sparsity=0.2, epochs=0, **QUICK)
    alone = omgoptim.prune(parent.run_id, **asked)
    away = omgoptim.prune(parent.run_id, on="ray", workers=2, **asked)
    assert alone.sensitivity
    assert away.sensitivity == alone.sensitivity
