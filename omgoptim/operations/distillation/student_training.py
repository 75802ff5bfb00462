"""Training of a student with the teacher, or of the control without it; resumable."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

from torch import nn

from omgoptim.models.samples import as_tensors, repeat_to_size
from omgoptim.operations.compression_job import Job
from omgoptim.operations.distillation.student import Student
from omgoptim.operations.distillation.workers import train_on_workers
from omgoptim.operations.rounds.checkpoint import RoundState, read_round, record_training, training_of, write_round
from omgoptim.reports import Round, Training
from omgoptim.requests import DistillRequest
from omgoptim.training.config import TrainingConfig, config_for_data
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.layer_trace import trace
from omgoptim.training.loop import Objective, Trainer, TrainingRound

PRETRAINED_LEARNING_RATE = 3e-4
"""Peak learning rate of Adam for a student initialized with a transformer's weights; that for random initialization
would destroy them."""


def train(
    job: Job[DistillRequest],
    student: Student,
    name: str,
    span: tuple[float, float],
    *,
    teacher: nn.Module | None,
    epochs: int | None = None,
    start: nn.Module | None = None,
) -> RoundState:
    """Train a copy of the student; an interrupted training is resumed.

    Args:
        job: the run.
        student: its untrained module, and how it is called.
        name: of this training, the same in a resumed run.
        span: start and end of its progress as fractions of the run.
        teacher: None to train on the targets only.
        epochs: default: those of the request.
        start: the initial weights; default: the student's own.

    Raises:
        OmgoptimError: as `fit` does.
    """
    request, datasets = job.request, job.datasets
    folder = job.context.checkpoints / name
    done = read_round(folder / "done", student.base)
    if done is not None:
        return done
    module = copy.deepcopy(start or student.module)
    if request.workers > 1:
        job.context.progress(f"{name}, training on {request.workers} workers", span[0])
        train_on_workers(job, student, module, name, teacher is not None, epochs or request.epochs)
        done = read_round(folder / "done", student.base)
        assert done is not None  # written by the line before
        return done
    check = datasets.loss.check if datasets.loss is not None else lambda _target: None
    plan = config_for_data(_plan(job, student, epochs or request.epochs), request, datasets.batches, check)

    def progress(stage: str, fraction: float | None) -> None:
        doing = f"{name}, {stage}" if request.control or name != "student" else stage
        job.context.progress(doing, None if fraction is None else span[0] + (span[1] - span[0]) * fraction)

    objective = Objective(datasets.loss)
    if teacher is not None:
        objective = Objective(datasets.loss, teacher, _distillation(request), _features(job, module, teacher))
    trainer = Trainer(module, datasets.batches, objective, plan, datasets.evaluator)
    fitted = trainer.fit(TrainingRound(checkpoints=folder / "training"), progress, job.context.publish)
    state = RoundState(module, Round(number=1, quality_trained=fitted.quality), student.changes)
    record_training(state, fitted)
    write_round(folder / "done", state, student.base)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return state


def training_record(job: Job[DistillRequest], student: Student, state: RoundState) -> Training | None:
    """Return the report's record of a training."""
    return training_of([state], _plan(job, student, job.request.epochs), job.datasets.evaluator.metric.name)


def _plan(job: Job[DistillRequest], student: Student, epochs: int) -> TrainingConfig:
    """Return the training configuration; with a lower default learning rate for pretrained transformer layers."""
    request = job.request
    plan = TrainingConfig.of(request, epochs, job.loaded.device, request.seed)
    adaptive = request.learning_rate is None and request.optimizer in ("adam", "adamw")
    goes_on = student.recipe is None and getattr(request.student, "initialize", "teacher") == "teacher"
    normalized = any(isinstance(layer, nn.LayerNorm) for layer in student.module.modules())
    return replace(plan, learning_rate=PRETRAINED_LEARNING_RATE) if adaptive and goes_on and normalized else plan


def _distillation(request: DistillRequest) -> DistillationLoss:
    return DistillationLoss(request.temperature, request.alpha, form=request.output_loss)


def _features(job: Job[DistillRequest], module: nn.Module, teacher: nn.Module) -> FeatureLoss | None:
    request, loaded = job.request, job.loaded
    if request.features == "none":
        return None
    inputs = as_tensors(repeat_to_size(job.datasets.statistics, 2), loaded.signature.dtypes)
    own, theirs = (trace(each, loaded.signature, inputs) for each in (module, teacher))
    return FeatureLoss.of(
        request.features, request.feature_weight, request.feature_layers, own, theirs, seed=request.seed
    )
