"""One training of a student: with the teacher, or without it as the control; kept, so that a cut run goes on."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

from torch import nn

from omgoptim.models.samples import as_tensors, repeat_to_size
from omgoptim.operations.compression_job import Job
from omgoptim.operations.distillation.student import Student
from omgoptim.operations.rounds.checkpoint import Stage, note_training, read_stage, training_of, write_stage
from omgoptim.reports import Round, Training
from omgoptim.requests import DistillRequest
from omgoptim.training.config import TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.loop import fit
from omgoptim.training.small_data import config_for_data

GENTLE = 3e-4
"""Peak learning rate of Adam for a student that begins with a transformer's weights: what suits a network that begins
at random undoes them."""


def train(
    job: Job[DistillRequest],
    student: Student,
    arm: str,
    span: tuple[float, float],
    *,
    teacher: nn.Module | None,
    epochs: int | None = None,
    start: nn.Module | None = None,
) -> Stage:
    """Train a copy of the student; what a cut run had done of it is not done again.

    Args:
        arm: name of this training, the same in a run that goes on.
        span: fractions of the whole run between which progress moves.
        teacher: learnt from; None: from the targets alone.
        epochs: default: those of the request.
        start: the weights to begin with; default: the student's own.

    Raises:
        OmgoptimError: as `fit` does.
    """
    request, datasets = job.request, job.datasets
    folder = job.context.checkpoints / arm
    done = read_stage(folder / "done", student.base)
    if done is not None:
        return done
    module = copy.deepcopy(start or student.module)
    check = datasets.loss.check if datasets.loss is not None else lambda _target: None
    plan = config_for_data(_plan(job, student, epochs or request.epochs), request, datasets.batches, check)

    def progress(told: str, fraction: float | None) -> None:
        doing = f"{arm}, {told}" if request.control or arm != "student" else told
        job.context.progress(doing, None if fraction is None else span[0] + (span[1] - span[0]) * fraction)

    fitted = fit(
        module,
        datasets.batches,
        datasets.loss,
        plan,
        datasets.judge,
        checkpoints=folder / "training",
        progress=progress,
        teacher=teacher,
        distillation=None if teacher is None else _distillation(request),
        features=None if teacher is None else _features(job, module, teacher),
    )
    stage = Stage(module, Round(number=1, quality_trained=fitted.quality), student.changes)
    note_training(stage, fitted)
    write_stage(folder / "done", stage, student.base)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return stage


def training_record(job: Job[DistillRequest], student: Student, stage: Stage) -> Training | None:
    """What a training did, for the report."""
    return training_of([stage], _plan(job, student, job.request.epochs), job.datasets.judge.metric.name)


def _plan(job: Job[DistillRequest], student: Student, epochs: int) -> TrainingConfig:
    """The plan of the request; a gentler learning rate where none was given and trained layers are to be kept."""
    request = job.request
    plan = TrainingConfig.of(request, epochs, job.loaded.device, request.seed)
    adaptive = request.learning_rate is None and request.optimizer in ("adam", "adamw")
    goes_on = student.recipe is None and getattr(request.student, "initialize", "teacher") == "teacher"
    normalized = any(isinstance(layer, nn.LayerNorm) for layer in student.module.modules())
    return replace(plan, learning_rate=GENTLE) if adaptive and goes_on and normalized else plan


def _distillation(request: DistillRequest) -> DistillationLoss:
    return DistillationLoss(request.temperature, request.alpha, form=request.output_loss)


def _features(job: Job[DistillRequest], module: nn.Module, teacher: nn.Module) -> FeatureLoss | None:
    request, loaded = job.request, job.loaded
    if request.features == "none":
        return None
    return FeatureLoss.of(
        request.features,
        request.feature_weight,
        request.feature_layers,
        student=module,
        teacher=teacher,
        signature=loaded.signature,
        inputs=as_tensors(repeat_to_size(job.datasets.statistics, 2), loaded.signature.dtypes),
        seed=request.seed,
    )
