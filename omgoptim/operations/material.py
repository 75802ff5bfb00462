"""What compressing a module learns from: training batches, samples for statistics, and samples that choose.

Nothing here is evaluation data: statistics come from the train split, choices from the calibration split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import DataError
from omgoptim.models.samples import Samples, batch_length, call_of, of_size
from omgoptim.operations.overlap import overlap_notes
from omgoptim.operations.subject import Live, Subject
from omgoptim.requests import RecoveryRequest, TrainingRequest
from omgoptim.runtimes.signature import flatten
from omgoptim.training.batches import Batches, as_target
from omgoptim.training.judge import Judge
from omgoptim.training.losses import Loss, loss_of

STATISTICS_SAMPLES = 512
"""Samples of the train split that norms, moments, gradients and batch-norm statistics are read from."""

SELECTION_SAMPLES = 1000
"""Most samples that rounds and epochs are chosen on."""


@dataclass(frozen=True, slots=True)
class Material:
    """The data of one run, each part for its own purpose."""

    statistics: Samples
    selection: Samples
    batches: Batches
    judge: Judge
    loss: Loss | None
    """None without targets: there the original's outputs are all that can be learnt."""
    epochs: int
    notes: list[str] = field(default_factory=list)


def gather(request: TrainingRequest, subject: Subject, module: nn.Module, live: Live | None) -> Material:
    """The material of a request.

    Raises:
        DataError: training was asked for and there is nothing to train on, or nothing to choose on.
    """
    live = live or Live()
    statistics = subject.samples("train", STATISTICS_SAMPLES)
    selection = subject.samples("calibration", SELECTION_SAMPLES)
    notes = []
    has_train = subject.data.real and statistics.count > 0
    if not statistics.count:
        statistics = selection
    if not selection.count:
        selection = statistics
        notes.append("the calibration split is empty: rounds and epochs were chosen on training samples")
    if not selection.count:
        raise DataError(
            "there is no data to choose on",
            "splits 'calibration' and 'train' are both empty, and choices are never made on evaluation data",
            "let load('calibration') give a few hundred samples, and load('train') the training data",
        )
    notes += overlap_notes(statistics, "that the model learns from", subject)
    notes += overlap_notes(selection, "that choose", subject)
    epochs = _epochs(request, has_train)
    loss = loss_for(request, subject, module, statistics, live)
    if epochs and loss is None and isinstance(request, RecoveryRequest) and not request.distill:
        raise DataError(
            "there is nothing to train towards",
            "the training data has no targets, and learning from the original's outputs was switched off",
            "let the batches carry targets, or leave distill on",
        )
    limit_s = request.time_limit_s
    judge = Judge.of(module, selection, subject.signature, subject.metric, subject.reach, limit_s, subject.device)
    batches = Batches(subject.data, module, subject.signature)
    return Material(statistics, selection, batches, judge, loss, epochs, notes)


def _epochs(request: TrainingRequest, has_train: bool) -> int:
    if isinstance(request, RecoveryRequest) and request.recover == "none":
        return 0
    if request.epochs is None:
        return 1 if has_train else 0
    if request.epochs and not has_train:
        raise DataError(
            f"{request.epochs} epochs were asked for, and there is no training data",
            "the data gave no batch for split 'train'" if request.data else "no data was given",
            "give data whose load('train') returns the training samples, or epochs=0",
        )
    return request.epochs


def loss_for(
    request: TrainingRequest, subject: Subject, module: nn.Module, statistics: Samples, live: Live
) -> Loss | None:
    """The loss on the targets; None where the data has none."""
    target = statistics.targets[0]
    if target is None and live.loss is None and request.loss == "auto":
        return None
    first = statistics.batches[0]
    args, kwargs = call_of(subject.signature, first)
    with torch.inference_mode():
        outputs = module(*args, **kwargs)
    given: Any = live.loss or request.loss
    example = None if target is None else as_target(target, batch_length(first))
    return loss_of(given, outputs, example, subject.reach, request.time_limit_s, module=module)


def scoring_loss(loss: Loss | None) -> Callable[[Any, Any], Tensor]:
    """A loss whose gradient says which weights matter: on the targets, or without them the size of the outputs."""

    def score(outputs: Any, target: Any) -> Tensor:
        first: Tensor = flatten(outputs)[0]
        if loss is not None and target is not None:
            return loss.function(outputs, as_target(target, len(first)))
        return 0.5 * first.float().square().mean()

    return score


def one_sample(subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a forward on one evaluation-shaped sample, for counting."""
    return call_of(subject.signature, of_size(subject.evaluation, 1))
