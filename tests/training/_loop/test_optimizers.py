from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from omgoptim.requests import PruneRequest
from omgoptim.training.config import LEARNING_RATES, TrainingConfig, lr_factor, optimizer_of


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
    assert config.words == "sgd, learning rate 0.01, linear, 2 batches a step"
    given = TrainingConfig.of(PruneRequest(model="net.py:build", learning_rate=0.3), 1, "cpu", 0)
    assert given.learning_rate == 0.3
