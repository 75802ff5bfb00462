"""A training config that fits the amount of training data: batch size and peak learning rate for few optimizer steps.

Adam moves every weight by about the learning rate in each of its first steps, whatever the gradient's size. One such
step at the full rate of 1e-3 on a trained network is a jump, not a correction. So with few samples the batch shrinks
until an epoch has several steps, and with few steps in all the peak rate falls with the square root of their number.
Values that the request names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from omgoptim.requests.training import TrainingFields
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingConfig
from omgoptim.training.randomness import own_randomness

STEPS_AN_EPOCH = 8
"""Minimum optimizer steps per epoch while the batch can shrink."""
SMALLEST_BATCH = 8
"""Lower bound of the shrunk batch: batch normalization estimates its statistics from one batch."""
FEW_STEPS = 100
"""Total steps below which the default peak learning rate is scaled by sqrt(steps / 100)."""


def config_for_data(
    config: TrainingConfig, asked: TrainingFields, batches: Batches, check: Callable[[Any], None] = lambda _target: None
) -> TrainingConfig:
    """Return the config with a batch size and a peak learning rate that fit the amount of data.

    Args:
        config: as the request asks.
        asked: whose `train_batch` and `learning_rate` are kept where they are given.
        batches: of the train split.
        check: shown each target while the data is read, as for `Batches.survey`.

    Raises:
        DataError: the train data is empty, or whatever `check` raises.
    """
    if not config.epochs:
        return config
    with own_randomness():
        return _fitted(config, asked, batches, check)


def _fitted(
    config: TrainingConfig, asked: TrainingFields, batches: Batches, check: Callable[[Any], None]
) -> TrainingConfig:
    count, _ = batches.survey(config.batch, config.seed, check)
    if asked.train_batch is None and count * config.epochs < FEW_STEPS and count < STEPS_AN_EPOCH:
        samples = batches.samples(config.batch)
        smaller = max(SMALLEST_BATCH, samples // STEPS_AN_EPOCH)
        if smaller < config.batch:
            config = replace(config, batch=smaller)
            count, _ = batches.survey(config.batch, config.seed, check)
    steps = optimizer_steps(config, count)
    if asked.learning_rate is None and steps < FEW_STEPS:
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
    number = "1 optimizer step" if steps == 1 else f"{steps} optimizer steps"
    return (
        f"little training data: {samples:,} training samples give {number} in total, at a peak learning rate of "
        f"{config.learning_rate:.2g}; more epochs or more training data let training do more"
    )
