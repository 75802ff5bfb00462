"""Training configuration: hyperparameters, adapted to few training samples, and their optimizer and schedule.

Adam moves every weight by about the learning rate in each of its first steps, whatever the gradient's size. One such
step at the full rate of 1e-3 on a trained network is a jump, not a correction. So with few samples the batch shrinks
until an epoch has several steps, and with few steps in all the peak rate falls with the square root of their number.
Values that the request names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from omgoptim.requests.training import TrainingFields, TrainingRequest
from omgoptim.text import plural
from omgoptim.training.batches import Batches
from omgoptim.training.modes import own_randomness

Optimizer = Literal["adamw", "adam", "sgd", "rmsprop"]
Schedule = Literal["cosine", "linear", "constant", "one_cycle"]
Precision = Literal["no", "bf16", "fp16"]

LEARNING_RATES: dict[Optimizer, float] = {"adamw": 1e-3, "adam": 1e-3, "sgd": 1e-2, "rmsprop": 3e-4}
"""Default peak learning rates for the recovery of a compressed network. Adam's is torch's default; sgd's, with momentum
0.9, a tenth of that for training from scratch (arXiv:1512.03385); RMSprop's first step is ten times its rate (its
average begins at 0, without correction)."""

BATCH = 64
"""Default batch size with enough data; `config_for_data` lowers it. Chosen: common, and fits in memory."""

MIN_STEPS_PER_EPOCH = 8
"""Minimum optimizer steps per epoch while the batch can shrink. Chosen: with fewer, short trainings hardly move."""

MIN_BATCH = 8
"""Lower bound of the shrunk batch. Chosen: batch normalization estimates its statistics from one batch."""

FEW_STEPS = 100
"""Total steps below which the default peak rate is scaled by sqrt(steps / 100). Chosen: caution in short trainings."""

MOMENTUM = 0.9
"""Momentum of SGD: the value of the ResNet recipe, arXiv:1512.03385, section 3.4."""

ONE_CYCLE_RISE = 0.3
"""Minimum rising fraction of a one_cycle schedule: `pct_start` of torch's OneCycleLR."""

DIV_FACTOR, FINAL_DIV_FACTOR = 25.0, 1e4
"""`div_factor` and `final_div_factor` of torch's OneCycleLR."""


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Hyperparameters of one training."""

    epochs: int = 1
    learning_rate: float = LEARNING_RATES["adamw"]
    """Peak learning rate, after warmup."""
    optimizer: Optimizer = "adamw"
    lr_schedule: Schedule = "cosine"
    warmup: float = 0.05
    """Warmup steps as a fraction of all steps, 0..1."""
    weight_decay: float = 0.01
    """Weight decay, applied to weights of two or more dimensions."""
    accumulate: int = 1
    """Batches per optimizer step; the last step of an epoch may have fewer."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    mixed_precision: Precision = "no"
    patience: int = 0
    """Epochs without better quality after which training stops; 0: never."""
    batch: int = BATCH
    seed: int = 0
    device: str = "cpu"

    @staticmethod
    def of(request: TrainingRequest, epochs: int, device: str, seed: int) -> TrainingConfig:
        """Return the config of a request."""
        return TrainingConfig(
            epochs=epochs,
            learning_rate=request.learning_rate or LEARNING_RATES[request.optimizer],
            optimizer=request.optimizer,
            lr_schedule=request.lr_schedule,
            warmup=request.warmup,
            weight_decay=request.weight_decay,
            accumulate=request.accumulate,
            clip_norm=request.clip_norm,
            mixed_precision=request.mixed_precision,
            patience=request.patience,
            batch=request.train_batch or BATCH,
            seed=seed,
            device=device,
        )

    @property
    def summary(self) -> str:
        """Return the optimizer with its settings, as "adamw, learning rate 0.001, cosine"."""
        parts = [self.optimizer, f"learning rate {self.learning_rate:.3g}", self.lr_schedule]
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} batches per step")
        if self.mixed_precision != "no":
            parts.append(f"{self.mixed_precision} mixed precision")
        return ", ".join(parts)


def config_for_data(
    config: TrainingConfig,
    request: TrainingFields,
    batches: Batches,
    check: Callable[[Any], None] = lambda _target: None,
) -> TrainingConfig:
    """Return the config with a batch size and a peak learning rate that fit the amount of data.

    Args:
        config: as the request asks.
        request: whose `train_batch` and `learning_rate` are kept where they are given.
        batches: of the train split.
        check: shown each target while the data is read, as for `Batches.survey`.

    Raises:
        DataError: the train data is empty, or whatever `check` raises.
    """
    if not config.epochs:
        return config
    with own_randomness():
        return _fitted(config, request, batches, check)


def _fitted(
    config: TrainingConfig, request: TrainingFields, batches: Batches, check: Callable[[Any], None]
) -> TrainingConfig:
    count, _ = batches.survey(config.batch, config.seed, check)
    if request.train_batch is None and count * config.epochs < FEW_STEPS and count < MIN_STEPS_PER_EPOCH:
        samples = batches.samples(config.batch)
        smaller = max(MIN_BATCH, samples // MIN_STEPS_PER_EPOCH)
        if smaller < config.batch:
            config = replace(config, batch=smaller)
            count, _ = batches.survey(config.batch, config.seed, check)
    steps = optimizer_steps(config, count)
    if request.learning_rate is None and steps < FEW_STEPS:
        config = replace(config, learning_rate=config.learning_rate * math.sqrt(steps / FEW_STEPS))
    return config


def optimizer_steps(config: TrainingConfig, batches: int) -> int:
    """Return the optimizer steps of a whole training.

    Args:
        config: epochs and batch size.
        batches: in an epoch.
    """
    return math.ceil(batches / config.accumulate) * config.epochs


def few_steps_note(steps: int, samples: int, config: TrainingConfig) -> str | None:
    """Return a warning for a training of few steps; None for any other.

    Args:
        steps: optimizer steps of the training.
        samples: in an epoch.
        config: epochs and batch size.
    """
    if not 0 < steps < FEW_STEPS:
        return None
    return (
        f"little training data: {samples:,} training samples give {plural(steps, 'optimizer step')} in total, at a "
        f"peak learning rate of {config.learning_rate:.2g}; use more epochs or more training data"
    )


def optimizer_of(config: TrainingConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the config's optimizer on parameters; biases and normalization (one dimension) do not decay."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    filled: list[dict[str, Any]] = [group for group in groups if group["params"]]
    rate = config.learning_rate
    if config.optimizer == "adamw":
        return torch.optim.AdamW(filled, lr=rate)
    if config.optimizer == "adam":
        return torch.optim.Adam(filled, lr=rate)
    if config.optimizer == "sgd":
        return torch.optim.SGD(filled, lr=rate, momentum=MOMENTUM)
    return torch.optim.RMSprop(filled, lr=rate)


def scheduler_of(config: TrainingConfig, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Return the config's schedule over `steps` optimizer steps."""
    return LambdaLR(optimizer, lr_factor(config, steps))


def lr_factor(config: TrainingConfig, steps: int) -> Callable[[int], float]:
    """Return `factor(step)`, by which the peak learning rate is multiplied at a step, 0 <= step < steps.

    Of w = round(warmup x steps) warmup steps, at least one where there are two steps or more, step i has
    (i + 1) / (w + 1). From step w on, with p the fraction of the rest that is done: cosine (1 + cos(pi p)) / 2, linear
    1 - p, constant 1. one_cycle is torch's OneCycleLR, its rise at least 0.3 of the steps.
    """
    if config.lr_schedule == "one_cycle":
        return lambda step: _one_cycle(step, steps, max(config.warmup, ONE_CYCLE_RISE))
    warmup = round(config.warmup * steps)
    if config.warmup > 0 and steps > 1:
        warmup = max(warmup, 1)  # Adam's first step is as large as its rate, whatever the gradient

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        if config.lr_schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1 - done if config.lr_schedule == "linear" else 1.0

    return factor


def _one_cycle(step: int, steps: int, rise: float) -> float:
    top = rise * steps - 1
    if step <= top and top > 0:
        return _between(1 / DIV_FACTOR, 1.0, step / top)
    fall = steps - 1 - max(top, 0.0)
    return _between(
        1.0, 1 / DIV_FACTOR / FINAL_DIV_FACTOR, min((step - max(top, 0.0)) / fall, 1.0) if fall > 0 else 0.0
    )


def _between(start: float, end: float, done: float) -> float:
    """Interpolate from start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
