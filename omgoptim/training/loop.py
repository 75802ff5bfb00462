"""The one training loop, on Hugging Face Accelerate: fine-tuning, distillation and recovery are all this.

What is kept is what the judge found best, the untrained state included: training that only hurts is undone. A
checkpoint after each epoch makes a killed training end with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import RequestError, TechniqueError
from omgoptim.reports import Epoch
from omgoptim.training.batches import Batches
from omgoptim.training.checkpoints import (
    Checkpoint,
    all_tensors,
    checkpoint_file,
    plain,
    put_tensors,
    read_checkpoint,
    shapes,
    trained_tensors,
    write_checkpoint,
)
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.judge import Judge
from omgoptim.training.losses import Loss
from omgoptim.training.masks import ZeroMasks
from omgoptim.training.modes import teaching, training
from omgoptim.training.objective import Objective
from omgoptim.training.plan import TrainingPlan
from omgoptim.training.randomness import own_randomness, seed_everything
from omgoptim.training.steps import Steps, opened_steps
from omgoptim.training.telling import Progress, Teller


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a training did; its weights are in the module."""

    epochs: list[Epoch]
    """All that were run, those before a resume too. `best` marks the one whose weights the module has; none where
    training only hurt, and the weights are those from before it."""
    quality: float | None
    """The judge's, of the weights that were kept; None without one."""
    quality_before: float | None
    """The judge's, before training."""
    best_epoch: int
    """The epoch whose weights were kept; 0: those from before training."""
    loss: str
    """What was minimized, in words."""
    optimizer: str
    trained_params: int
    total_params: int
    seconds: float
    stopped: str | None = None
    """Why it ended before its last epoch, in words."""
    resumed: int = 0
    """How often it went on from a checkpoint."""
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Course:
    """Where a training stands."""

    records: list[Epoch] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """The judge's, from before training on."""
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    stopped: str | None = None
    seconds: float = 0.0
    resumed: int = 0

    @property
    def epoch(self) -> int:
        return len(self.records)


def fit(
    module: nn.Module,
    batches: Batches,
    loss: Loss | None,
    plan: TrainingPlan,
    judge: Judge | None,
    *,
    checkpoints: Path | None = None,
    progress: Progress = lambda _stage, _done: None,
    teacher: nn.Module | None = None,
    distillation: DistillationLoss | None = None,
    masks: ZeroMasks | None = None,
    round_number: int = 1,
    score: float | None = None,
) -> Fitted:
    """Train a module in place; it comes back on the CPU, in the modes it had, with the best weights.

    Which those are: the highest score of the judge, among the weights from before training and those after each epoch;
    of equal ones the latest. Without a judge those after the last epoch. A loss or a weight that is no number ends the
    training with the best weights so far. Parameters that do not require a gradient stay as they are, and batch
    normalization all of whose parameters are frozen keeps its mode.

    Each epoch begins with torch, numpy and random seeded from the plan's seed, the round and the epoch; the caller's
    random state is restored at the end. Data with a random state of its own (a DataLoader's `generator`) starts anew
    in a resumed process.

    Args:
        loss: on the targets; None to learn from the teacher alone.
        judge: what best weights and early stopping go by.
        checkpoints: a folder for one file per round; a training found there goes on after its last whole epoch.
        progress: told every second or so, with the loss and the time left.
        teacher: learnt from with `distillation`; not changed.
        masks: weights that stay zero.
        score: the judge's score of the module as it is, where that is known.

    Raises:
        RequestError: fp16 on a CPU.
        DataError: the train data does not fit the model or the loss; found on the first pass, before any step.
        TechniqueError: nothing can be trained: no parameter requires a gradient, or there is no loss and no teacher.
        RunError, ArtifactError: the checkpoint belongs to another training, or is damaged.
        SetupError: accelerate is not installed.
        UserCodeError: the user's data or loss failed.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    _refuse(plan, parameters, loss, teacher)
    if teacher is not None and distillation is None:
        distillation = DistillationLoss()
    course = _Course()
    with own_randomness(), training(module), teaching(teacher, plan.device):
        objective = Objective(batches.signature, loss, teacher, distillation)
        check = loss.check if loss is not None else lambda _target: None
        count, first = batches.survey(plan.batch, plan.seed, check) if plan.epochs else (0, None)
        per_epoch = math.ceil(count / plan.accumulate)
        with opened_steps(module, parameters, plan, per_epoch * plan.epochs, objective, masks) as steps:
            if first is not None:
                objective.settle(module, first.to(steps.device))
            identity = {
                **plain(plan),
                **shapes(module),
                "round": round_number,
                "metric": judge.metric.name if judge else None,
                "loss": objective.name,
                "trained": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
                "batches per epoch": count,
                "weights held at zero": masks.count() if masks else 0,
            }
            path = checkpoint_file(checkpoints, round_number) if checkpoints else None
            if masks is not None:
                masks.hold()
            _begin(module, course, steps, judge, score, read_checkpoint(path, identity) if path else None)
            while course.epoch < plan.epochs and course.stopped is None:
                _one_epoch(module, course, batches, plan, steps, judge, round_number, count, progress)
                if path:
                    write_checkpoint(path, _checkpoint(module, course, steps, identity))
            if course.best_epoch != course.epoch or course.stopped:
                put_tensors(module, course.best)
    for parameter in module.parameters():
        parameter.grad = None
    return _fitted(module, course, plan, objective.name, len(course.scores) > 0, parameters)


def _refuse(plan: TrainingPlan, parameters: list[nn.Parameter], loss: Loss | None, teacher: nn.Module | None) -> None:
    if plan.mixed_precision == "fp16" and plan.device == "cpu":
        raise RequestError(
            "fp16 mixed precision does not train on a CPU",
            "its gradients need a scaler that exists for GPUs",
            "use --mixed-precision bf16, or no",
        )
    if plan.epochs and not parameters:
        raise TechniqueError(
            "the model has nothing to train",
            "none of its parameters requires a gradient",
            "unfreeze some (parameter.requires_grad_(True)), or use --epochs 0",
        )
    if plan.epochs and loss is None and teacher is None:
        raise TechniqueError(
            "there is nothing to learn from",
            "the train data has no targets, and the original model's outputs are not used",
            "give targets, or keep learning from the original on (distill)",
        )


def _begin(
    module: nn.Module,
    course: _Course,
    steps: Steps,
    judge: Judge | None,
    score: float | None,
    checkpoint: Checkpoint | None,
) -> None:
    """The untrained state as the first candidate, or where a checkpoint stands."""
    if checkpoint is None:
        course.best = trained_tensors(module)
        course.scores = [judge.score(module) if score is None else score] if judge else []
        return
    put_tensors(module, checkpoint.state)
    device = steps.device
    saved = checkpoint.best or {name: checkpoint.state[name] for name in trained_tensors(module)}
    course.best = {name: tensor.to(device) for name, tensor in saved.items()}
    course.records, course.scores = checkpoint.records, list(checkpoint.scores)
    course.best_epoch, course.stopped = checkpoint.best_epoch, checkpoint.stopped
    goes_on = course.stopped is None and course.epoch < steps.plan.epochs
    course.seconds, course.resumed = checkpoint.seconds, checkpoint.resumed + goes_on
    steps.restore(checkpoint)


def _one_epoch(
    module: nn.Module,
    course: _Course,
    batches: Batches,
    plan: TrainingPlan,
    steps: Steps,
    judge: Judge | None,
    round_number: int,
    count: int,
    progress: Progress,
) -> None:
    started, epoch = time.perf_counter(), course.epoch + 1
    seed_everything(plan.seed, round_number, epoch)
    told = Teller(progress, plan.epochs, epoch, count)
    loss = steps.epoch(batches.epoch(plan.batch), told)
    score = None
    if not math.isfinite(loss):
        course.stopped = f"the loss was {loss:g} in epoch {epoch}; the weights are those {_of(course.best_epoch)}"
    elif not all(bool(torch.isfinite(parameter).all()) for parameter in steps.parameters):
        course.stopped = f"a weight was no number after epoch {epoch}; the weights are those {_of(course.best_epoch)}"
    else:
        score = judge.score(module) if judge else None
        if score is None or score >= max(course.scores):
            course.best, course.best_epoch = trained_tensors(module), epoch
        if score is not None:
            course.scores.append(score)
    seconds = time.perf_counter() - started
    course.seconds += seconds
    course.records.append(
        Epoch(
            round=round_number,
            epoch=epoch,
            loss=loss if math.isfinite(loss) else None,
            quality=score if score is not None and math.isfinite(score) else None,
            learning_rate=steps.last_rate,
            seconds=seconds,
        )
    )
    if course.stopped is None and plan.patience and score is not None and epoch < plan.epochs:
        waited = epoch - course.scores.index(max(course.scores))  # an equal score is no better one
        if waited >= plan.patience:
            course.stopped = f"no better quality in {waited} epoch{'s' if waited > 1 else ''}"


def _of(epoch: int) -> str:
    return f"of epoch {epoch}" if epoch else "from before training"


def _checkpoint(module: nn.Module, course: _Course, steps: Steps, identity: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        identity=identity,
        state=all_tensors(module),
        best={} if course.best_epoch == course.epoch else course.best,
        best_epoch=course.best_epoch,
        scores=course.scores,
        epochs=[record.model_dump() for record in course.records],
        stopped=course.stopped,
        seconds=course.seconds,
        resumed=course.resumed,
        **steps.state(),
    )


def _fitted(
    module: nn.Module, course: _Course, plan: TrainingPlan, loss: str, judged: bool, trained: list[nn.Parameter]
) -> Fitted:
    notes = []
    if course.best_epoch == 0 and course.records and course.stopped is None:
        notes.append("training did not help: no epoch was better than the weights from before it, which are back")
    records = [record.model_copy(update={"best": record.epoch == course.best_epoch}) for record in course.records]
    return Fitted(
        epochs=records,
        quality=max(course.scores) if judged else None,
        quality_before=course.scores[0] if judged else None,
        best_epoch=course.best_epoch,
        loss=loss,
        optimizer=plan.words,
        trained_params=sum(parameter.numel() for parameter in trained),
        total_params=sum(parameter.numel() for parameter in module.parameters()),
        seconds=course.seconds,
        stopped=course.stopped,
        resumed=course.resumed,
        notes=notes,
    )
