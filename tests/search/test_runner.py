"""A trial from its spec to its folder: rejected before training, stopped at its rung, or trained to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from omgoptim.architecture_search.runner import WEIGHTS, MeasuredCost, TrialFunctions, finalists, run_trial
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.errors import TechniqueError

EPOCHS = 9
"""Three rungs of 1, 2 and 6 epochs."""


def spec(number: int, width: int) -> TrialSpec:
    return TrialSpec(number=number, configuration={"width": width}, seed=0, parent="m", data="d", epochs=EPOCHS)


class Recorder:
    """Steps on a small Linear: latency is the width, and each epoch adds the width to the one weight that counts."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, int]] = []
        self.measured: list[str] = []

    def build(self, configuration: Any) -> nn.Module:
        module = nn.Linear(int(configuration["width"]), 1)
        nn.init.zeros_(module.weight)
        return module

    def measure(self, module: Any, folder: Path) -> MeasuredCost:
        self.measured.append(folder.name)
        folder.mkdir()
        return MeasuredCost(
            latency_ms=float(module.in_features), size_bytes=8, loads={"latency": module.in_features / 10}
        )

    def train(self, module: Any, rung: int, epochs: int, checkpoints: Path) -> float:
        self.trained.append((rung, epochs))
        with torch.no_grad():
            module.weight += epochs * module.in_features
        return float(module.weight.detach()[0, 0])

    def steps(self, **more: Any) -> TrialFunctions:
        return TrialFunctions(self.build, self.measure, self.train, **more)


@pytest.fixture
def folders(tmp_path: Path) -> TrialFolders:
    return TrialFolders(tmp_path / "trials")


def run(folders: TrialFolders, steps: TrialFunctions, number: int, width: int) -> TrialResult:
    return folders.run(spec(number, width), lambda spec, folder: run_trial(steps, folders, spec, folder))


def test_the_first_trial_climbs_every_rung(folders: TrialFolders) -> None:
    made = Recorder()
    result = run(folders, made.steps(), 0, 4)
    assert (result.outcome, result.rungs) == ("trained", (4.0, 12.0, 36.0))
    assert made.trained == [(0, 1), (1, 2), (2, 6)]
    assert made.measured == ["untrained"]
    assert (result.measured_ms, (folders.path(0) / WEIGHTS).is_file()) == (4.0, True)


def test_a_worse_trial_stops_at_its_rung(folders: TrialFolders) -> None:
    made = Recorder()
    run(folders, made.steps(), 0, 4)
    result = run(folders, made.steps(), 1, 3)
    assert (result.outcome, result.rungs) == ("stopped", (3.0,))


def test_a_network_that_is_measured_over_the_limit_is_never_trained(folders: TrialFolders) -> None:
    made = Recorder()
    result = run(folders, made.steps(), 0, 11)
    assert (result.outcome, result.loads, result.measured_ms) == ("rejected", {"latency": 1.1}, 11.0)
    assert made.trained == []


def test_a_network_that_is_predicted_far_over_the_limit_is_not_even_measured(folders: TrialFolders) -> None:
    made = Recorder()
    result = run(folders, made.steps(predict=lambda _: 20.0, limit_ms=10.0), 0, 4)
    assert (result.outcome, made.measured, made.trained) == ("rejected", [], [])
    near = run(folders, made.steps(predict=lambda _: 11.0, limit_ms=10.0), 1, 4)
    assert (near.outcome, near.predicted_ms, near.measured_ms) == ("trained", 11.0, 4.0)


def test_a_trial_that_raises_keeps_its_reason(folders: TrialFolders) -> None:
    def build(configuration: Any) -> nn.Module:
        raise TechniqueError("the network has no output", "its kernel is too large")

    made = Recorder()
    result = run(folders, TrialFunctions(build, made.measure, made.train), 0, 4)
    assert (result.outcome, result.reason) == ("failed", "the network has no output: its kernel is too large")


def test_the_best_trials_go_on_where_they_stopped_and_only_once(folders: TrialFolders, tmp_path: Path) -> None:
    made, finals = Recorder(), TrialFolders(tmp_path / "finals")
    for number, width in enumerate((5, 4, 3, 2)):
        run(folders, made.steps(), number, width)
    made.trained.clear()
    made.measured.clear()
    ended = finalists(made.steps(), folders, finals, count=2)
    assert [(each.number, result.rungs) for each, result in ended] == [(0, (5.0, 15.0, 45.0)), (1, (4.0, 12.0, 36.0))]
    assert made.trained == [(1, 2), (2, 6)]
    assert made.measured == ["artifact"] * 2  # what is delivered is measured as it was trained
    assert all((finals.path(number) / "artifact").is_dir() for number in (0, 1))
    assert finalists(made.steps(), folders, finals, count=2) == ended
    assert made.trained == [(1, 2), (2, 6)]


def test_weights_that_are_gone_are_an_error_with_the_trial(folders: TrialFolders, tmp_path: Path) -> None:
    made = Recorder()
    for number, width in enumerate((5, 4)):
        run(folders, made.steps(), number, width)
    (folders.path(1) / WEIGHTS).unlink()
    ended = finalists(made.steps(), folders, TrialFolders(tmp_path / "finals"), count=2)
    assert ended[1][1].outcome == "failed"
    assert "trial 00001" in ended[1][1].reason
