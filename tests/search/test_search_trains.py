"""A whole small search with the real training loop: modules of a user's space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import batches_of, blobs, evaluator_of, net
from torch import nn

from omgoptim.architecture_search.define_by_run import build, look
from omgoptim.architecture_search.drive import Plan, TrialLoop, drive
from omgoptim.architecture_search.runner import MeasuredCost, TrialFunctions, finalists, fitting, run_trial
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.training.config import TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.losses import loss_of

LIMIT = 220


def space(trial: Any) -> nn.Module:
    width = trial.suggest_categorical("width", [2, 4, 8, 16, 32])
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(trial.suggest_int("layers", 0, 2))]
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), *layers, nn.Linear(width, 3)).eval()


def weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def measure(module: nn.Module, folder: Path) -> MeasuredCost:
    return MeasuredCost(latency_ms=weights(module) / 100, loads={"latency": weights(module) / LIMIT})


@pytest.mark.slow
def test_a_search_trains_within_the_limit_and_its_finals_to_the_end(tmp_path: Path) -> None:
    x, y = blobs(192)
    teacher = net()
    found = look(space, seed=0).space
    assert found is not None
    train = fitting(
        batches_of(teacher, x, y),
        loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), teacher(x[:8]), y[:8]),
        lambda epochs: TrainingConfig(epochs=epochs, learning_rate=1e-2, batch=32),
        evaluator_of(teacher, x, y),
        teacher,
        DistillationLoss(),
    )
    steps = TrialFunctions(lambda configuration: build(space, configuration), measure, train)
    folders, finals = TrialFolders(tmp_path / "trials"), TrialFolders(tmp_path / "finals")

    def load(rows: Any) -> Any:
        return np.array([weights(build(space, found.configuration(row))) for row in rows]) / LIMIT

    def trial(spec: TrialSpec, folder: Path) -> TrialResult:
        return run_trial(steps, folders, spec, folder)

    ended = drive(found, lambda _: load, TrialLoop(trial, Plan(4, 0, "m", "d", epochs=9), tmp_path))
    assert (ended.trained, ended.rejected, ended.failed) == (4, 0, 0)
    best = finalists(steps, folders, finals, count=2)
    assert [len(result.rungs) for _, result in best] == [3, 3]
    assert all(result.loads["latency"] <= 1.0 for _, result in best)
    assert max(result.rungs[-1] for _, result in best) > 0.6  # a guess is right for a third
