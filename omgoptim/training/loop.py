"""The one training loop, on Hugging Face Accelerate: fine-tuning, distillation and recovery are all this.

What is kept is what the judge found best, the untrained state included: training that only hurts is undone. A
checkpoint after each epoch makes a killed training end with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.errors import RequestError, TechniqueError, argument
from omgoptim.reports import Epoch
from omgoptim.training._loop.checkpoints import (
    checkpoint_file,
    plain,
    put_tensors,
    read_checkpoint,
    shapes,
    write_checkpoint,
)
from omgoptim.training._loop.combined_loss import Objective
from omgoptim.training._loop.progress import Progress
from omgoptim.training._loop.steps import opened_steps
from omgoptim.training._loop.training_state import Course
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingPlan
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.evaluator import Judge
from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.losses import Loss
from omgoptim.training.modes import teaching, training
from omgoptim.training.randomness import own_randomness
from omgoptim.training.small_data import few_steps_note, steps_of
from omgoptim.training.zero_masks import ZeroMasks


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
    teacher_outputs: str | None = None
    """Whether the teacher's outputs were computed once and kept, or for every batch, in words; None where they have no
    part in the loss."""
    few_steps: str | None = None
    """That there was little to train on, with the number of steps; None where there was enough."""
    notes: list[str] = field(default_factory=list)


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
    features: FeatureLoss | None = None,
    masks: ZeroMasks | None = None,
    round_number: int = 1,
    score: float | None = None,
) -> Fitted:
    """Train a module in place; it comes back on the CPU, in the modes it had, with the best weights.

    Which those are: the highest score of the judge, among the weights from before training and those after each epoch;
    of equal ones the latest, but one that only equals the score from before training has to be as near to the outputs
    of the original, too. Without a judge those after the last epoch. A loss or a weight that is no number ends the
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
        teacher: learnt from with `distillation`; not changed. Its outputs are computed once for each sample where the
            inputs are the same in every epoch, and there are several.
        features: what is learnt from the teacher's layers too; its adapters are trained, and stay in it.
        masks: weights that stay zero.
        score: the judge's score of the module as it is, where that is known.

    Raises:
        RequestError: fp16 on a CPU.
        DataError: the train data does not fit the model or the loss, or the teacher's outputs not the module's; found
            on the first pass, before any step.
        TechniqueError: nothing can be trained: no parameter requires a gradient, or there is no loss and no teacher;
            the distance to the teacher is of a kind that its outputs are not for.
        RunError, ArtifactError: the checkpoint belongs to another training, or is damaged.
        SetupError: accelerate is not installed.
        UserCodeError: the user's data or loss failed.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    _refuse(plan, parameters, loss, teacher)
    if features is not None and teacher is None:
        raise ValueError("features are learnt from a teacher, and there is none")
    if teacher is not None and distillation is None:
        distillation = DistillationLoss()
    adapters = [] if features is None else list(features.parameters())
    with own_randomness(), training(module), teaching(teacher, plan.device):
        objective = Objective(batches.signature, loss, teacher, distillation, features, module, outputs=batches.outputs)
        check = loss.check if loss is not None else lambda _target: None
        count, first = batches.survey(plan.batch, plan.seed, check) if plan.epochs else (0, None)
        total = steps_of(plan, count)
        with opened_steps(module, [*parameters, *adapters], plan, total, objective, masks) as steps:
            if first is not None:
                objective.settle(module, first.to(steps.device))
            identity = _identity(module, plan, objective, judge, masks, round_number, count)
            path = checkpoint_file(checkpoints, round_number) if checkpoints else None
            if masks is not None:
                masks.hold()
            course = Course(module, steps, judge, round_number)
            course.begin(score, read_checkpoint(path, identity) if path else None)
            if first is not None and course.goes_on:
                course.ask_teacher(batches, count, first, progress)
            while course.goes_on:
                course.one_epoch(batches, count, progress)
                if path:
                    write_checkpoint(path, course.checkpoint(identity))
            if course.best_epoch != course.epoch or course.stopped:
                put_tensors(module, course.best)
    for parameter in [*module.parameters(), *adapters]:
        parameter.grad = None
    fitted = _fitted(module, course, plan, objective.name, len(course.scores) > 0, parameters)
    note = few_steps_note(total, batches.samples(plan.batch), plan) if plan.epochs else None
    return replace(fitted, few_steps=note)


def _identity(
    module: nn.Module,
    plan: TrainingPlan,
    objective: Objective,
    judge: Judge | None,
    masks: ZeroMasks | None,
    round_number: int,
    count: int,
) -> dict[str, Any]:
    """What a checkpoint has to have in common with this training, as plain values."""
    features = objective.features
    return {
        **plain(plan),
        **shapes(module),
        "round": round_number,
        "metric": judge.metric.name if judge else None,
        "loss": objective.name,
        "features": features.names if features is not None else None,
        "trained": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
        "batches per epoch": count,
        "weights held at zero": masks.count() if masks else 0,
    }


def _refuse(plan: TrainingPlan, parameters: list[nn.Parameter], loss: Loss | None, teacher: nn.Module | None) -> None:
    if plan.mixed_precision == "fp16" and plan.device == "cpu":
        raise RequestError(
            "fp16 mixed precision does not train on a CPU",
            "its gradients need a scaler that exists for GPUs",
            f"use {argument('mixed_precision', 'bf16')}, or no",
        )
    if plan.epochs and not parameters:
        raise TechniqueError(
            "the model has nothing to train",
            "none of its parameters requires a gradient",
            f"unfreeze some (parameter.requires_grad_(True)), or use {argument('epochs', 0)}",
        )
    if plan.epochs and loss is None and teacher is None:
        raise TechniqueError(
            "there is nothing to learn from",
            "the train data has no targets, and the original model's outputs are not used",
            "give targets, or keep learning from the original on (distill)",
        )


def _fitted(
    module: nn.Module, course: Course, plan: TrainingPlan, loss: str, judged: bool, trained: list[nn.Parameter]
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
        teacher_outputs=course.teacher_outputs,
        notes=notes,
    )
