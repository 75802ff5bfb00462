"""Optimizer and learning-rate schedule of a training config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from omgoptim.training.config import TrainingConfig

MOMENTUM = 0.9
"""Momentum of SGD: the value of the ResNet recipe, arXiv:1512.03385, section 3.4."""
ONE_CYCLE_RISE = 0.3
"""Minimum rising fraction of a one_cycle schedule: `pct_start` of torch's OneCycleLR."""
START, END = 25.0, 1e4
"""`div_factor` and `final_div_factor` of torch's OneCycleLR."""


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
        return _between(1 / START, 1.0, step / top)
    fall = steps - 1 - max(top, 0.0)
    return _between(1.0, 1 / START / END, min((step - max(top, 0.0)) / fall, 1.0) if fall > 0 else 0.0)


def _between(start: float, end: float, done: float) -> float:
    """Interpolate from start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
