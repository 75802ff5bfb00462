"""search, distill and optimize on several workers: the same results as on one, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import omgoptim
from omgoptim.errors import RequestError, SetupError
from omgoptim.executors import Task
from omgoptim.executors.local import LocalExecutor
from omgoptim.jobs.actions import cancel
from omgoptim.jobs.folder import find_run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)

SPACE = """

def space(trial):
    width = trial.suggest_categorical("width", [4, 8, 16])
    kernel = trial.suggest_categorical("kernel", [3, 5])
    depth = trial.suggest_int("depth", 0, 1)
    more = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()] * depth
    return nn.Sequential(nn.Conv2d(1, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(), *more,
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))
"""

COMMON: dict[str, Any] = {
    "data": "net.py:load",
    "timing": "quick",
    "samples": 100,
    "threads": 1,
    "checkpoint": "net.pt",
}
SEARCH: dict[str, Any] = COMMON | {
    "samples": 100,
    "target_size_mb": 0.02,
    "epochs": 3,
    "max_quality_drop": 1.0,
    "proposals": 3,
}


@pytest.fixture
def spaces(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (project / "net.py").write_text((project / "net.py").read_text() + SPACE)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return project


def trials(project: Path, run_id: str) -> dict[str, tuple[float, ...]]:
    """Qualities at each rung of a search's trials, by configuration."""
    folders = (project / ".omgoptim" / "runs" / run_id / "search" / "trials").glob("[0-9]" * 5)
    return {
        json.dumps(json.loads((folder / "spec.json").read_text())["configuration"]): tuple(
            json.loads((folder / "result.json").read_text())["rungs"]
        )
        for folder in sorted(folders)
    }


@pytest.mark.slow
@pytest.mark.parametrize("on", ["local", "ray"])
def test_two_workers_find_the_trials_and_the_network_of_one(spaces: Path, on: str) -> None:
    if on == "ray":
        pytest.importorskip("ray")
    alone = omgoptim.search("net.py:net", "net.py:space", trials=6, **SEARCH)
    shared = omgoptim.search("net.py:net", "net.py:space", trials=6, on=on, workers=2, **SEARCH)
    one, two = trials(spaces, alone.run_id), trials(spaces, shared.run_id)
    assert list(two) == list(one)
    assert all(two[each] == pytest.approx(one[each], abs=1e-6) for each in one)
    assert shared.delivered == alone.delivered
    workers = [json.loads(file.read_text()) for file in (spaces / ".omgoptim").rglob("trials/*/worker.json")]
    assert len({worker["pid"] for worker in workers}) > 1
    assert os.getpid() not in {worker["pid"] for worker in workers}


@pytest.mark.slow
def test_a_cancelled_search_on_ray_leaves_no_process(spaces: Path) -> None:
    pytest.importorskip("ray")
    words = [sys.executable, "-m", "omgoptim.cli", "search", "net.py:net", "--space", "net.py:space", "--trials", "6"]
    words += ["--checkpoint", "net.pt", "--data", "net.py:load", "--target-size-mb", "0.02", "--epochs", "90"]
    words += ["--timing", "quick", "--threads", "1", "--on", "ray", "--workers", "2", "--no-wait"]
    run_id = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    folder = find_run(spaces, run_id)
    while not list(folder.path.glob("search/trials/*.tmp-*/worker.json")):
        assert folder.stored_state().status in ("starting", "queued", "running"), folder.log_file.read_text()
        time.sleep(0.05)
    assert cancel(folder).status == "cancelled"
    _, alive = psutil.wait_procs(processes_of(folder.path), timeout=20)
    assert alive == []


def test_a_worker_with_other_weights_refuses_to_train(spaces: Path, tmp_path: Path) -> None:
    from omgoptim.requests import parse

    asked = {"model": "net.py:net", "space": "net.py:space", "project": str(spaces)} | SEARCH
    problem = {
        "verb": "search",
        "request": parse("search", asked).model_dump(mode="json"),
        "project": str(spaces),
        "scratch": str(tmp_path),
        "run_id": "search-1",
        "runtime": "onnxruntime",
        "identity": "another",
    }
    spec = {"number": 0, "configuration": {"width": 4, "kernel": 3, "depth": 0}, "seed": 0, "parent": "net.py:net"}
    payload = {"problem": problem, "spec": spec | {"data": "net.py:load", "epochs": 1}, "others": [], "before": []}
    executor = LocalExecutor(1, spaces)
    try:
        function = "omgoptim.operations.architecture_search.tasks:train_trial"
        future = executor.submit(Task(function, payload, tmp_path / "00000"))
        with pytest.raises(omgoptim.OmgoptimError, match="differ between a worker and the driver"):
            future.result(120)
    finally:
        executor.close()
    assert not list(tmp_path.glob("00000*"))


def test_an_address_without_a_head_is_an_error_before_any_work(spaces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SetupError, match="no Ray head answers"):
        omgoptim.search("net.py:nothing", "net.py:space", on="ray", **SEARCH)


@pytest.mark.slow
def test_workers_write_the_candidates_of_a_model_that_is_an_object_of_the_session(spaces: Path) -> None:
    scope: dict[str, Any] = {}
    exec((spaces / "net.py").read_text(), scope)
    asked: dict[str, Any] = {"data": scope["load"], "timing": "quick", "samples": 100, "threads": 1}
    module = scope["net"]()
    alone, shared = (omgoptim.quantize(module, workers=workers, **asked) for workers in (1, 2))
    sizes = [{one.name: one.size_bytes for one in report.candidates} for report in (alone, shared)]
    assert sizes[0] == sizes[1]
    assert not [one for one in shared.candidates if one.status == "failed"]


def test_objects_of_the_session_cannot_be_sent_to_workers(spaces: Path) -> None:
    import torch

    with pytest.raises(RequestError, match="the Python object given as module cannot be sent"):
        omgoptim.optimize(torch.nn.Linear(2, 2), data="net.py:load", on="ray")


@pytest.mark.slow
@pytest.mark.parametrize("on", ["local", "ray"])
def test_two_workers_distill_a_student_as_well_as_one(spaces: Path, on: str) -> None:
    if on == "ray":
        pytest.importorskip("ray.train", reason="needs ray[train]", exc_type=ImportError)
    asked = COMMON | {"samples": 500, "epochs": 6, "max_quality_drop": 1.0}
    alone = omgoptim.distill("net.py:net", "narrow", **asked)
    shared = omgoptim.distill("net.py:net", "narrow", on=on, workers=2, **asked)
    assert alone.after is not None
    assert shared.after is not None
    assert alone.training is not None
    assert shared.training is not None
    assert len(shared.training.epochs) == len(alone.training.epochs) == 6
    assert shared.after.params == alone.after.params
    assert shared.after.quality == pytest.approx(alone.after.quality, abs=0.06)
    run = spaces / ".omgoptim" / "runs" / shared.run_id
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_a_worker_of_one_training_that_is_lost_ends_it_and_a_resumed_run_goes_on(spaces: Path) -> None:
    words = [sys.executable, "-m", "omgoptim.cli", "distill", "net.py:net", "--student", "narrow", "--epochs", "40"]
    words += ["--checkpoint", "net.pt", "--data", "net.py:load", "--timing", "quick", "--samples", "100"]
    words += ["--threads", "1", "--max-quality-drop", "1", "--workers", "2"]
    run_id = subprocess.run([*words, "--no-wait"], capture_output=True, text=True, check=True).stdout.strip()
    folder = find_run(spaces, run_id)
    shared = folder.checkpoints / "student"
    while not list(shared.glob("shared/training/*.pt")):
        assert folder.stored_state().status in ("starting", "queued", "running"), folder.log_file.read_text()
        time.sleep(0.02)
    [second] = [json.loads(file.read_text())["pid"] for file in shared.glob("rank-1.tmp-1/worker.json")]
    os.kill(second, signal.SIGKILL)
    wait = [sys.executable, "-m", "omgoptim.cli", "runs", "wait", run_id, "--json"]
    assert subprocess.run(wait, capture_output=True, text=True, check=False).returncode == 3
    resumed = [sys.executable, "-m", "omgoptim.cli", "runs", "resume", run_id]
    assert subprocess.run(resumed, capture_output=True, text=True, check=False).returncode == 0
    report = json.loads(folder.report_file.read_text())
    assert report["training"]["resumed"] == 1
    assert len(report["training"]["epochs"]) == 40


@pytest.mark.slow
def test_ray_train_goes_on_from_the_last_epoch_when_a_worker_is_killed(spaces: Path) -> None:
    pytest.importorskip("ray.train", reason="needs ray[train]", exc_type=ImportError)
    words = [sys.executable, "-m", "omgoptim.cli", "distill", "net.py:net", "--student", "narrow", "--epochs", "40"]
    words += ["--checkpoint", "net.pt", "--data", "net.py:load", "--timing", "quick", "--samples", "100"]
    words += ["--threads", "1", "--max-quality-drop", "1", "--on", "ray", "--workers", "2"]
    run_id = subprocess.run([*words, "--no-wait"], capture_output=True, text=True, check=True).stdout.strip()
    folder = find_run(spaces, run_id)
    while not list(folder.checkpoints.glob("student/shared/training/*.pt")):
        assert folder.stored_state().status in ("starting", "queued", "running"), folder.log_file.read_text()
        time.sleep(0.02)
    workers = [each for each in processes_of(folder.path) if any("RayTrainWorker" in word for word in each.cmdline())]
    assert len(workers) == 2
    workers[-1].kill()
    wait = [sys.executable, "-m", "omgoptim.cli", "runs", "wait", run_id, "--json"]
    assert subprocess.run(wait, capture_output=True, text=True, check=False).returncode == 0, (
        folder.log_file.read_text()
    )
    training = json.loads(folder.report_file.read_text())["training"]
    assert (training["resumed"], len(training["epochs"])) == (1, 40)
    _, alive = psutil.wait_procs(processes_of(folder.path), timeout=20)
    assert alive == []


@pytest.mark.slow
@pytest.mark.parametrize("on", ["local", "ray"])
def test_two_workers_optimize_as_one(spaces: Path, on: str) -> None:
    if on == "ray":
        pytest.importorskip("ray")
    # The guard and the preference keep the speed of the moment out of every decision.
    asked = COMMON | {"runtime": "onnxruntime", "prefer": "size", "max_quality_drop": 0.0, "budget_minutes": 60}
    alone = omgoptim.optimize("net.py:net", **asked)
    shared = omgoptim.optimize("net.py:net", on=on, workers=2, **asked)
    runs = spaces / ".omgoptim" / "runs"
    assert "2 of 2 steps trained by 2 workers" in (runs / shared.run_id / "events.jsonl").read_text()
    ledgers = [
        [json.loads(line) for line in (runs / one.run_id / "ledger.jsonl").read_text().splitlines()]
        for one in (alone, shared)
    ]
    steps = [[(entry["step"], entry["measured"]["quality"]) for entry in ledger] for ledger in ledgers]
    keys = [[entry["key"] for entry in ledger if entry["parent"] == "original"] for ledger in ledgers]
    assert (steps[0], keys[0]) == (steps[1], keys[1])
    assert {"prune", "distill"} <= {step for step, _ in steps[0]}
    assert shared.delivered == alone.delivered
    assert alone.after is not None
    assert shared.after is not None
    assert (shared.after.quality, shared.after.size_bytes) == (alone.after.quality, alone.after.size_bytes)


def processes_of(run: Path) -> list[psutil.Process]:
    """Return the processes that a run started and that still run."""
    found = psutil.process_iter(["environ"])
    return [each for each in found if (each.info["environ"] or {}).get("OMGOPTIM_RUN") == str(run)]
