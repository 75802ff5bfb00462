"""A whole small search with the real training loop: modules of a user's space."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from small_training import batches_of, blobs, evaluator_of, net
from torch import nn

from omgoptim.architecture_search.define_by_run import build, probe_space
from omgoptim.architecture_search.runner import MeasuredCost, TrialFunctions
from omgoptim.architecture_search.search_loop import LoopSettings, TrialLoop, search_product
from omgoptim.architecture_search.trials import TrialFolders
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.architecture_search.tasks import TaskRunner
from omgoptim.training.config import TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.loop import Objective, Trainer, TrainingRound
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
    found = probe_space(space, seed=0).space
    assert found is not None
    loss = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), teacher(x[:8]), y[:8])
    objective = Objective(loss, teacher, DistillationLoss())

    def train(module: nn.Module, rung: int, epochs: int, checkpoints: Path) -> float:
        checkpoints.mkdir(parents=True, exist_ok=True)
        config = TrainingConfig(epochs=epochs, learning_rate=1e-2, batch=32)
        trainer = Trainer(module, batches_of(teacher, x, y), objective, config, evaluator_of(teacher, x, y))
        quality = trainer.fit(TrainingRound(rung + 1, checkpoints)).quality
        assert quality is not None
        return quality

    steps = TrialFunctions(lambda configuration: build(space, configuration), measure, train)
    folders, finals = TrialFolders(tmp_path / "trials"), TrialFolders(tmp_path / "finals")

    def load(rows: Any) -> Any:
        return np.array([weights(build(space, found.configuration(row))) for row in rows]) / LIMIT

    job = SimpleNamespace(context=SimpleNamespace(work=tmp_path / "work"))
    runner = TaskRunner(None, cast(Any, job), steps, "")
    loop = TrialLoop(partial(runner.start, folders), LoopSettings(4, 0, "m", "d", epochs=9), tmp_path)
    ended = search_product(found, lambda _: load, loop)
    assert (ended.trained, ended.rejected, ended.failed) == (4, 0, 0)
    best = runner.train_finalists(folders, finals, count=2)
    assert [len(result.rungs) for _, result in best] == [3, 3]
    assert all(result.loads["latency"] <= 1.0 for _, result in best)
    assert max(result.rungs[-1] for _, result in best) > 0.6  # a guess is right for a third
