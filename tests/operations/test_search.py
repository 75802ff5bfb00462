"""search: the plan, refusals before any training, and whole runs of a user's space and of the model's own stages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import omgoptim
from omgoptim.errors import RequestError, SetupError, TechniqueError, UserCodeError
from omgoptim.jobs.folder import find_run
from omgoptim.jobs.states import read_state

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SPACE = """

def space(trial):
    width = trial.suggest_categorical("width", [4, 8, 16])
    kernel = trial.suggest_categorical("kernel", [3, 5])
    depth = trial.suggest_int("depth", 0, 1)
    more = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()] * depth
    return nn.Sequential(nn.Conv2d(1, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(), *more,
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))

def fails(trial):
    raise ValueError(f"no width {trial.suggest_int('width', 1, 4)}")

def conditional(trial):
    width = trial.suggest_int("width", 8, 9)
    layers = [nn.Conv2d(1, width, trial.suggest_categorical("kernel", [3, 5]), padding="same")]
    if width > 8:
        layers += [nn.Conv2d(width, width, trial.suggest_categorical("second", [3, 5]), padding="same")]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))

def not_a_number(trial):
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float("nan")
    return nn.Sequential(nn.Flatten(), Broken(64, 10, trial.suggest_categorical("bias", [True, False])))

def fixed(trial):
    return net()

number = 4
"""

COMMON: dict[str, Any] = {"data": "net.py:load", "timing": "quick", "samples": 100, "threads": 1}
SMALL: dict[str, Any] = COMMON | {"target_size_mb": 0.02, "epochs": 3, "max_quality_drop": 1.0}
"""A target that no speed of the machine decides."""


@pytest.fixture
def spaces(project: Path) -> Path:
    (project / "net.py").write_text((project / "net.py").read_text() + SPACE)
    return project


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("net.py:number", RequestError, "is not callable"),
        ("net.py:net", RequestError, "takes no trial"),
        ("net.py:fails", UserCodeError, "gave no module in any of its trials"),
        ("net.py:fixed", UserCodeError, "varies nothing"),
    ],
)
def test_what_is_no_space_is_refused_before_any_work(
    spaces: Path, model: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        omgoptim.search(model, **SMALL)


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"budget_minutes": 0.01}, RequestError, r"a budget of 0\.01 minutes is too short"),
        ({"precision": "int8", "runtime": "torch_eager"}, RequestError, "does not run statically quantized"),
        (
            {"model": "net.py:net", "checkpoint": "net.pt", "space": "net.py:conditional", "target_size_mb": 0.0005},
            TechniqueError,
            "the smallest of 8 sampled networks is at",
        ),
        ({"model": "net.py:conditional", "control": "random"}, RequestError, "no random control"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_any_training(
    spaces: Path, asked: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as refused:
        omgoptim.search(**{"model": "net.py:space"} | SMALL | asked)
    assert re.search(words, str(refused.value))


def test_a_search_without_a_target_is_refused() -> None:
    with pytest.raises(RequestError, match="needs a target"):
        omgoptim.search("net.py:space", data="net.py:load")


def test_without_optuna_the_install_line_comes_before_any_work(spaces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SetupError) as refused:
        omgoptim.search("net.py:nothing", **SMALL)
    assert "omgoptim[search]" in refused.value.fix


def test_a_target_below_the_floor_is_refused_with_the_nearest_one(spaces: Path) -> None:
    with pytest.raises(RequestError, match="no model fits into 1e-06 MB") as refused:
        omgoptim.search("net.py:space", **SMALL | {"target_size_mb": 1e-6})
    assert "at least" in refused.value.fix


def test_a_plan_lists_the_choices_and_trains_nothing(spaces: Path) -> None:
    report = omgoptim.search("net.py:space", plan=True, **SMALL)
    assert {one.name: one.why for one in report.candidates} == {"width": "4, 8, 16", "kernel": "3, 5", "depth": "0, 1"}
    assert report.summary.startswith("12 networks of 3 choices")
    assert report.after is None


@pytest.mark.slow
def test_a_limit_far_below_the_lightest_network_ends_before_any_trial(spaces: Path) -> None:
    with pytest.raises(TechniqueError, match="no network of the space meets the targets"):
        omgoptim.search(
            "net.py:net", "net.py:space", checkpoint="net.pt", trials=2, **SMALL | {"target_size_mb": 0.0008}
        )


@pytest.mark.slow
def test_a_space_alone_is_measured_against_its_largest_network(
    spaces: Path, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    report = omgoptim.search("net.py:space", trials=8, **SMALL)
    assert report.after is not None
    assert report.after.size_bytes is not None
    assert report.after.size_bytes <= 20_000
    statuses = [one.status for one in report.candidates]
    assert statuses.count("chosen") == 1
    trained = [one for one in report.candidates if one.quality is not None]
    assert len(trained) == 8 or any("no further network" in warning for warning in report.warnings)
    images, target = digits
    right = (omgoptim.open_artifact(report.run_id)(images[:100]).argmax(1) == target[:100]).float().mean().item()
    assert right == pytest.approx(report.after.quality, abs=1e-6)
    other = report.alternatives[0]
    assert omgoptim.pick(report.run_id, other.name).delivered == other.name


@pytest.mark.slow
def test_a_space_whose_networks_give_no_numbers_ends_with_that_reason(spaces: Path) -> None:
    with pytest.raises(TechniqueError, match="no network of the space could be measured") as failed:
        omgoptim.search("net.py:net", "net.py:not_a_number", checkpoint="net.pt", trials=2, **SMALL)
    assert "nan" in failed.value.why.lower()


@pytest.mark.slow
@pytest.mark.parametrize("space", ["net.py:conditional", "net.py:space"])
def test_networks_are_searched_and_delivered_in_int8(spaces: Path, space: str) -> None:
    asked = SMALL | {"target_size_mb": 0.012, "precision": "int8", "runtime": "onnxruntime"}
    report = omgoptim.search("net.py:net", space, checkpoint="net.pt", trials=3, **asked)
    assert report.after is not None
    assert report.after.precision == "int8"
    assert report.after.size_bytes is not None
    assert report.after.size_bytes <= 12_000


@pytest.mark.slow
def test_the_stages_of_a_model_are_varied_with_the_model_as_teacher(spaces: Path) -> None:
    report = omgoptim.search(
        "net.py:net", "auto", checkpoint="net.pt", trials=3, control="random", **SMALL | {"target_size_mb": 0.018}
    )
    assert report.after is not None
    assert report.after.size_bytes is not None
    assert report.after.size_bytes <= 18_000
    assert "Random search with the same rejection" in report.summary
    assert any(one.name.startswith("random trial") for one in report.candidates)


@pytest.mark.slow
def test_a_killed_search_goes_on_and_repeats_no_finished_trial(spaces: Path) -> None:
    words = [sys.executable, "-m", "omgoptim.cli", "search", "net.py:net", "--space", "net.py:space", "--trials", "4"]
    words += ["--checkpoint", "net.pt", "--data", "net.py:load", "--target-size-mb", "0.02", "--epochs", "3"]
    words += ["--timing", "quick", "--samples", "100", "--threads", "1", "--max-quality-drop", "1", "--no-wait"]
    run_id = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    folder = spaces / ".omgoptim" / "runs" / run_id
    while not list(folder.glob("search/trials/*/result.json")):
        assert read_state(find_run(spaces, run_id)).status in ("starting", "queued", "running")
        time.sleep(0.05)
    worker = find_run(spaces, run_id).read_worker()
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    before = {file: file.stat().st_mtime_ns for file in folder.glob("search/trials/*/result.json")}
    assert before
    done = subprocess.run(
        [sys.executable, "-m", "omgoptim.cli", "runs", "resume", run_id], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == at for file, at in before.items())
    outcomes = [json.loads(file.read_text())["outcome"] for file in sorted(folder.glob("search/trials/*/result.json"))]
    assert sum(outcome in ("trained", "stopped") for outcome in outcomes) == 4
