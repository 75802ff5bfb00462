"""Training with int8 simulated: what a quantize run with scheme qat does before it makes its candidates."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omgoptim.errors import DataError, TechniqueError
from omgoptim.models.memory_check import refuse_beyond_memory, training_bytes
from omgoptim.models.samples import Samples, forward_args, shared_samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.data_overlap import OVERLAP, overlap_notes
from omgoptim.operations.datasets import STATISTICS_SAMPLES, loss_for
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.quantization.build_candidates import float_program
from omgoptim.operations.quantization.candidates import Program
from omgoptim.operations.quantization.converted_evaluator import ConvertedEvaluator, note_learned, was_trained
from omgoptim.operations.quantization.splits import Splits
from omgoptim.operations.rounds.checkpoint import Stage, note_training, training_of
from omgoptim.operations.save_and_measure import require_module
from omgoptim.reports import Round, Training
from omgoptim.requests import ModelRequest, QuantizeRequest, TrainingRequest
from omgoptim.requests.quantize import Qat
from omgoptim.requests.training import TrainingFields
from omgoptim.techniques.quantize._onnx.runtime import weight_levels
from omgoptim.techniques.quantize._ptq.qat_state import ChannelScaling, compute_scaling
from omgoptim.techniques.quantize.qat import static_of
from omgoptim.techniques.registry import Outcome
from omgoptim.training.batches import Batches
from omgoptim.training.config import LEARNING_RATES, TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.evaluator import Evaluator
from omgoptim.training.fake_quantization import FakeQuantized, Simulation
from omgoptim.training.loop import TrainingResult, fit
from omgoptim.training.losses import Loss
from omgoptim.training.randomness import own_randomness
from omgoptim.training.small_data import config_for_data

GENTLE = 0.1
"""Peak learning rate, as a fraction of what suits the optimizer for training: the weights are good ones already."""

STARTED, TRAINED = 0.1, 0.3
"""Fractions of the whole run between which training moves its progress."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The subject with its trained weights, its program, and what is told of the training."""

    loaded: LoadedModel
    program: Program
    training: Training | None
    fact: str
    """A sentence: what training brought over post-training static quantization."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What is learnt from."""

    batches: Batches
    loss: Loss | None
    distills: bool
    notes: list[str]


def train(
    request: QuantizeRequest,
    params: Qat,
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    splits: Splits,
    live: Live | None,
) -> Trained:
    """Train a copy of the subject's module with int8 simulated; a run that was cut off goes on.

    Args:
        program: of the untrained module.

    Raises:
        RequestError: the model is no float module.
        DataError: there is nothing to train on, or nothing to learn.
        TechniqueError: no layer can be trained in int8, or the module cannot be converted.
    """
    original = require_module(loaded, "quantize with scheme qat")
    if program.path is None:
        raise program.error or TechniqueError("the model has no program")
    asked = _as_training(request, params)
    lesson = _lesson(asked, params, loaded, original, splits.selection, live or Live())
    refuse_beyond_memory(training_bytes(original), "training the model with int8 simulated")
    plan = TrainingConfig.of(asked, params.epochs, loaded.device, request.seed)
    if params.learning_rate is None:
        plan = replace(plan, learning_rate=GENTLE * LEARNING_RATES[params.optimizer])
    check = lesson.loss.check if lesson.loss is not None else lambda _target: None
    with own_randomness():
        plan = config_for_data(plan, asked, lesson.batches, check)
        count, _ = lesson.batches.survey(plan.batch, plan.seed, check)
    context.progress("reading ranges to train with", STARTED)
    scaling = _scaling(params, context, loaded, program, splits)
    module = FakeQuantized(copy.deepcopy(original), _simulation(params, scaling), count * plan.epochs)
    device = loaded.device
    module.calibrate((forward_args(loaded.signature, batch, device) for batch in splits.calibration.batches), device)
    judge = _judge(request, params, context, loaded, program.path, splits, scaling)
    fitted = fit(
        module,
        lesson.batches,
        lesson.loss,
        plan,
        judge,
        checkpoints=context.checkpoints / "qat",
        progress=_progress(context),
        teacher=original if lesson.distills else None,
        distillation=DistillationLoss(params.temperature, params.alpha) if lesson.distills else None,
    )
    return _trained(context, loaded, program, module, fitted, plan, judge, lesson.notes)


def _trained(
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    module: FakeQuantized,
    fitted: TrainingResult,
    plan: TrainingConfig,
    judge: ConvertedEvaluator,
    notes: list[str],
) -> Trained:
    """The plain module with what it has learnt, as a program, and what is told of it."""
    trained = replace(loaded, module=module.module.eval(), program=None)
    if was_trained(module):
        program = float_program(trained, context, "trained")
        if program.path is None:
            raise program.error or TechniqueError("the trained model has no program")
        note_learned(module, program.path, judge.peaks)
    stage = Stage(module.module, Round(number=1), Outcome([]))
    note_training(stage, fitted)
    record = training_of([stage], plan, judge.metric.name)
    warnings = [
        *notes,
        *([fitted.few_steps] if fitted.few_steps else []),
        *([f"training ended early: {fitted.stopped}"] if fitted.stopped else []),
    ]
    return Trained(trained, program, record, brought(fitted, judge.metric.name, judge.samples.count), warnings)


def brought(fitted: TrainingResult, metric: str, samples: int) -> str:
    """What training brought over the same conversion of the untrained weights, in a sentence."""
    before, after = fitted.quality_before, fitted.quality
    if before is None or after is None:
        return ""
    where = f"on the {samples} selection samples"
    if fitted.best_epoch == 0 or after == before:
        back = (
            ": the weights from before it are back"
            if fitted.best_epoch == 0
            else f": {metric} is {after:.4f} as before"
        )
        return f"Training brought nothing over post-training static quantization {where}{back}."
    return (
        f"Training brought {after - before:+.4f} {metric} over post-training static quantization {where} "
        f"({before:.4f} to {after:.4f}, epoch {fitted.best_epoch})."
    )


def _as_training(request: QuantizeRequest, params: Qat) -> TrainingRequest:
    """The same, as a verb that trains would be asked."""
    common = {name: getattr(request, name) for name in ModelRequest.model_fields}
    return TrainingRequest(**common, **{name: getattr(params, name) for name in TrainingFields.model_fields})


def _lesson(
    asked: TrainingRequest, params: Qat, loaded: LoadedModel, original: nn.Module, selection: Samples, live: Live
) -> _Lesson:
    statistics = loaded.samples("train", STATISTICS_SAMPLES)
    if not loaded.data.real or not statistics.count:
        raise DataError(
            "scheme qat trains, and there is no training data",
            "the data gave no batch for split 'train'" if loaded.data.real else "no data was given",
            "give data whose load('train') returns the training samples; scheme static needs none",
        )
    loss = loss_for(asked, loaded, original, statistics, live)
    if loss is None and params.distill is False:
        raise DataError(
            "there is nothing to train towards",
            "the training data has no targets, and learning from the float model's outputs was switched off",
            "let the batches carry targets, or leave distill out",
        )
    notes = overlap_notes(statistics, "that the model learns from", loaded)
    shared = shared_samples(selection, statistics)
    if shared > selection.count * OVERLAP:
        notes.append(
            f"{shared} of the {selection.count} samples that choose the epoch are training samples too: "
            "let load('calibration') give others"
        )
    several = len(loaded.outputs.compared) > 1  # labels speak of one output: the float model teaches the others
    distills = (loss is None or several) if params.distill is None else params.distill
    return _Lesson(Batches(loaded.data, original, loaded.signature, loaded.outputs), loss, distills, notes)


def _scaling(params: Qat, context: RunContext, loaded: LoadedModel, program: Program, splits: Splits) -> ChannelScaling:
    if program.path is None or not params.equalize:
        return ChannelScaling()
    batches, threads = splits.calibration.batches, loaded.bench.threads
    return compute_scaling(program.path, static_of(params), batches, _scratch(context), threads)


def _simulation(params: Qat, scaling: ChannelScaling) -> Simulation:
    """What the conversion will do to the layers."""
    return Simulation(
        per_channel=params.granularity == "per_channel",
        symmetric=params.symmetric,
        weight_levels=weight_levels(),
        targets=params.targets,
        ignore=params.ignore,
        factors={path: torch.from_numpy(array) for path, array in scaling.factors.items()},
    )


def _judge(
    request: QuantizeRequest,
    params: Qat,
    context: RunContext,
    loaded: LoadedModel,
    untrained: Path,
    splits: Splits,
    scaling: ChannelScaling,
) -> ConvertedEvaluator:
    limit_s = request.time_limit_s
    original = require_module(loaded, "quantize with scheme qat")
    judge = Evaluator.of(
        original,
        splits.selection,
        loaded.signature,
        loaded.metric,
        loaded.policy,
        limit_s,
        described=loaded.outputs,
    )
    return ConvertedEvaluator(
        samples=judge.samples,
        signature=judge.signature,
        metric=judge.metric,
        outputs=judge.outputs,
        original=judge.original,
        limit_s=limit_s,
        params=params,
        untrained=untrained,
        peaks=scaling.peaks,
        calibration=splits.calibration.batches,
        example=loaded.example,
        scratch=_scratch(context),
        threads=loaded.bench.threads,
        seed=request.seed,
    )


def _scratch(context: RunContext) -> Path:
    folder = context.work / "judging"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _progress(context: RunContext) -> Any:
    def told(stage: str, done: float | None) -> None:
        context.progress(stage, None if done is None else STARTED + (TRAINED - STARTED) * done)

    return told
