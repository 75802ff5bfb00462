"""Training configuration: adapted to few samples, with its optimizer and schedule."""

from __future__ import annotations

import math
import warnings
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
from omgoptim.training.config import FEW_STEPS, LEARNING_RATES, TrainingConfig, config_for_data, lr_factor, optimizer_of
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


def test_distance_is_the_rms_of_the_difference_over_the_spread_of_each_entry_of_the_original() -> None:
    x, y = blobs(8)
    module = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        module[0].bias += torch.tensor([0.0, 50.0, -50.0])  # the means of the entries are no spread
    evaluator = evaluator_of(module, x, y)
    original = torch.cat([torch.from_numpy(batch[0]) for batch in evaluator.outputs])
    with torch.no_grad():
        module[0].bias += 0.5
    assert distance_to_original(evaluator, module) == pytest.approx(
        0.5 / float(original.var(0).mean().sqrt()), rel=1e-4
    )


def factors(steps: int, **config: Any) -> list[float]:
    factor = lr_factor(TrainingConfig(**config), steps)
    return [factor(step) for step in range(steps)]


def test_the_learning_rates_of_every_schedule_by_hand() -> None:
    assert factors(4, lr_schedule="constant", warmup=0.0) == [1, 1, 1, 1]
    assert factors(4, lr_schedule="linear", warmup=0.0) == [1, 0.75, 0.5, 0.25]
    assert factors(4, lr_schedule="linear", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 0.5])
    half = math.sqrt(0.5)
    assert factors(4, lr_schedule="cosine", warmup=0.0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert factors(1, lr_schedule="cosine", warmup=0.9) == [0.5]


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.05), (40, 0.5), (7, 0.3)])
def test_one_cycle_is_torchs(steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=max(warmup, 0.3), cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(torchs.get_last_lr()[0])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if len(expected) < steps:
                torchs.step()
    assert factors(steps, lr_schedule="one_cycle", warmup=warmup) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "one_cycle"])
def test_no_schedule_leaves_the_range_of_zero_to_the_peak(schedule: str) -> None:
    for steps in (1, 2, 3, 50):
        assert all(0 <= factor <= 1 for factor in factors(steps, lr_schedule=schedule))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_only_weights_of_two_or_more_dimensions_decay(name: Any) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    made = optimizer_of(TrainingConfig(optimizer=name, weight_decay=0.5, learning_rate=0.1), module.parameters())
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in module.parameters()] == [0.5, 0, 0, 0, 0.5, 0]
    assert {group["lr"] for group in made.param_groups} == {0.1}
    assert made.param_groups[0].get("momentum", 0) == (0.9 if name == "sgd" else 0)


def test_a_plan_is_the_request_with_its_defaults_filled_in() -> None:
    request = PruneRequest(model="net.py:build", optimizer="sgd", train_batch=7, lr_schedule="linear", accumulate=2)
    config = TrainingConfig.of(request, epochs=3, device="cpu", seed=5)
    assert (config.epochs, config.batch, config.seed, config.learning_rate) == (3, 7, 5, LEARNING_RATES["sgd"])
    assert config.summary == "sgd, learning rate 0.01, linear, 2 batches per step"
    given = TrainingConfig.of(PruneRequest(model="net.py:build", learning_rate=0.3), 1, "cpu", 0)
    assert given.learning_rate == 0.3
