from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import batches_of, blobs, evaluator_of, fit, net, same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.requests import PruneRequest
from omgoptim.training.config import FEW_STEPS, TrainingConfig, config_for_data
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.evaluator import distance_to_original
from omgoptim.training.losses import Loss, loss_of


def asked(**more: Any) -> PruneRequest:
    return PruneRequest(model="net.py:build", **more)


def plan_for(samples: int, epochs: int = 1, **more: Any) -> TrainingConfig:
    request, module = asked(**more), net()
    x, y = blobs(samples)
    return config_for_data(TrainingConfig.of(request, epochs, "cpu", 0), request, batches_of(module, x, y))


def test_with_few_samples_the_batch_shrinks_and_the_rate_falls_with_the_root_of_the_steps() -> None:
    config = plan_for(60)
    assert config.batch == 8  # eight steps an epoch instead of one
    assert config.learning_rate == pytest.approx(1e-3 * math.sqrt(8 / FEW_STEPS))
    assert plan_for(240).batch == 30
    assert plan_for(60, epochs=10).learning_rate == pytest.approx(1e-3 * math.sqrt(80 / FEW_STEPS))


def test_enough_data_is_trained_on_as_before() -> None:
    config = plan_for(640, epochs=10)
    assert (config.batch, config.learning_rate) == (64, 1e-3)


def test_a_batch_size_and_a_learning_rate_that_are_named_are_kept() -> None:
    config = plan_for(60, train_batch=32, learning_rate=0.01)
    assert (config.batch, config.learning_rate) == (32, 0.01)


def test_a_loader_keeps_its_own_batches() -> None:
    from small_training import signature_of, source

    from omgoptim.training.batches import Batches

    x, y = blobs(60)
    module, request = net(), asked()
    batches = Batches(source(DataLoader(TensorDataset(x, y), batch_size=30)), module, signature_of(module, x[:2]))
    config = config_for_data(TrainingConfig.of(request, 1, "cpu", 0), request, batches)
    assert batches.survey(config.batch, 0, lambda _: None)[0] == 2
    assert config.learning_rate == pytest.approx(1e-3 * math.sqrt(2 / FEW_STEPS))


def test_the_random_state_of_the_caller_is_untouched() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    plan_for(60)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_training_of_few_steps_says_how_many() -> None:
    module = net()
    x, y = blobs(60)
    loss = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), module(x[:8]), y[:8])
    fitted = fit(module, batches_of(module, x, y), loss, TrainingConfig(epochs=2, batch=8), None)
    assert fitted.few_steps is not None
    assert "60 training samples give 16 optimizer steps" in fitted.few_steps
    x, y = blobs(800)
    assert fit(module, batches_of(module, x, y), loss, TrainingConfig(epochs=1, batch=8), None).few_steps is None


def test_training_that_leaves_the_score_and_moves_away_from_the_original_is_undone() -> None:
    x, y = blobs(24)
    module = net(dropout=0.0)
    evaluator = evaluator_of(module, x, module(x).argmax(1))  # the original's own answers: accuracy 1
    before = state(module)

    def away(outputs: Any, _target: Any) -> torch.Tensor:
        return -outputs.square().mean()  # larger outputs, the same answers

    fitted = fit(module, batches_of(module, x, y), Loss("away", away), TrainingConfig(epochs=1, batch=8), evaluator)
    assert fitted.best_epoch == 0
    assert same(state(module), before)


def test_training_that_leaves_the_score_and_comes_nearer_to_the_original_is_kept() -> None:
    x, y = blobs(24)
    module, teacher = net(dropout=0.0), net(dropout=0.0)
    evaluator = evaluator_of(module, x, module(x).argmax(1))
    for parameter in module.parameters():
        parameter.requires_grad_(parameter is module.out.bias)
    with torch.no_grad():
        module.out.bias += 0.02  # of every class: the same answers
    start = distance_to_original(evaluator, module)
    assert evaluator.score(module) == 1.0
    batches, config = batches_of(module, x, y), TrainingConfig(epochs=4, batch=8, learning_rate=2e-3)
    fitted = fit(module, batches, None, config, evaluator, teacher=teacher, distillation=DistillationLoss(form="mse"))
    assert (fitted.quality, fitted.best_epoch > 0) == (1.0, True)
    assert distance_to_original(evaluator, module) < start


def test_distance_is_the_rms_of_the_difference_over_the_spread_of_the_original() -> None:
    x, y = blobs(8)
    module = nn.Sequential(nn.Linear(4, 3))
    evaluator = evaluator_of(module, x, y)
    original = torch.cat([torch.from_numpy(batch[0]) for batch in evaluator.outputs])
    with torch.no_grad():
        module[0].bias += 0.5
    assert distance_to_original(evaluator, module) == pytest.approx(0.5 / float(original.std(correction=0)), rel=1e-5)
