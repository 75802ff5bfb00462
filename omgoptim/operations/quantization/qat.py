"""Quantization-aware training of a quantize run, and the evaluator of the program that a module converts to."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omgoptim.errors import DataError, TechniqueError
from omgoptim.hardware import refuse_beyond_memory, training_bytes
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.manifest import PROGRAM
from omgoptim.models.samples import Samples, as_tensors, forward_args, shared_samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import OVERLAP, STATISTICS_SAMPLES, loss_for, overlap_notes
from omgoptim.operations.float_program import Program, float_program
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.quantization.splits import Splits
from omgoptim.operations.rounds.checkpoint import RoundState, record_training, training_of
from omgoptim.operations.save_module import require_module
from omgoptim.reports import Round, Training
from omgoptim.requests import ModelRequest, QuantizeRequest, TrainingRequest
from omgoptim.requests.quantize import Qat
from omgoptim.requests.training import TrainingFields
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.techniques.quantize._onnx.program import weight_levels
from omgoptim.techniques.quantize._ptq.qat_state import (
    ChannelScaling,
    Peaks,
    QatState,
    compute_scaling,
    write_qat_state,
)
from omgoptim.techniques.quantize.qat import static_of
from omgoptim.techniques.registry import Outcome, ProgramRun, apply_to_program
from omgoptim.training.batches import Batches
from omgoptim.training.config import LEARNING_RATES, TrainingConfig, config_for_data
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.evaluator import COLLAPSED, Evaluator
from omgoptim.training.fake_quantization import FakeQuantized, IntegerFormats
from omgoptim.training.loop import Objective, Trainer, TrainingResult, TrainingRound
from omgoptim.training.losses import Loss
from omgoptim.training.modes import own_randomness

FINE_TUNING_FACTOR = 0.1
"""Peak learning rate relative to training from scratch, since the weights are trained already. Chosen."""

STARTED_AT, TRAINED_AT = 0.1, 0.3
"""Fractions of the run's progress at which training starts and ends."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Trained model, its program, and the record of its training."""

    loaded: LoadedModel
    program: Program
    training: Training | None
    fact: str
    """Sentence on the effect of training over post-training static quantization."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _TrainingData:
    """Training data, loss, and whether to distill."""

    batches: Batches
    loss: Loss | None
    distills: bool
    notes: list[str]


def train(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    splits: Splits,
    live: Live | None,
) -> TrainedModel:
    """Train a copy of the model with int8 simulated; an interrupted training is resumed.

    Args:
        request: of the run, with scheme qat.
        context: of the run.
        loaded: the original, which is not changed.
        program: of the untrained module.
        splits: train, calibration and selection samples.
        live: objects of the caller's process; None in a worker.

    Raises:
        RequestError: the model is not a float module.
        DataError: there is no training data, or neither targets nor distillation.
        TechniqueError: no layer can be trained in int8, or the module cannot be converted.
    """
    params = _params_of(request)
    original = require_module(loaded, "quantize with scheme qat")
    if program.path is None:
        raise program.error or TechniqueError("the model has no program")
    asked = _as_training(request, params)
    training_data = _training_data(asked, params, loaded, original, splits.selection, live or Live())
    refuse_beyond_memory(training_bytes(original), "training the model with int8 simulated")
    plan = TrainingConfig.of(asked, params.epochs, loaded.device, request.seed)
    if params.learning_rate is None:
        plan = replace(plan, learning_rate=FINE_TUNING_FACTOR * LEARNING_RATES[params.optimizer])
    check = Objective(training_data.loss).check
    with own_randomness():
        plan = config_for_data(plan, asked, training_data.batches, check)
        count, _ = training_data.batches.survey(plan.batch, plan.seed, check)
    context.progress("calibrating ranges for training", STARTED_AT)
    scaling = _scaling(params, context, loaded, program, splits)
    module = FakeQuantized(copy.deepcopy(original), _simulation(params, scaling), count * plan.epochs)
    device = loaded.device
    module.calibrate((forward_args(loaded.signature, batch, device) for batch in splits.calibration.batches), device)
    evaluator = _converted_evaluator(request, context, loaded, program.path, splits, scaling)
    objective = Objective(training_data.loss)
    if training_data.distills:
        objective = Objective(training_data.loss, original, DistillationLoss(params.temperature, params.alpha))
    trainer = Trainer(module, training_data.batches, objective, plan, evaluator)
    progress = context.part(STARTED_AT, TRAINED_AT)
    fitted = trainer.fit(TrainingRound(checkpoints=context.checkpoints / "qat"), progress, context.publish)
    trained = replace(loaded, module=module.module.eval(), program=None)
    program = _trained_program(module, trained, context, evaluator) if was_trained(module) else program
    state = RoundState(module.module, Round(number=1), Outcome([]))
    record_training(state, fitted)
    metric = evaluator.metric.name
    record, effect = training_of([state], plan, metric), training_effect(fitted, metric, evaluator.samples.count)
    return TrainedModel(trained, program, record, effect, [*training_data.notes, *_training_warnings(fitted)])


def _params_of(request: QuantizeRequest) -> Qat:
    assert isinstance(request.scheme, Qat)  # what trains has this scheme
    return request.scheme


def _trained_program(
    module: FakeQuantized, trained: LoadedModel, context: RunContext, evaluator: ConvertedEvaluator
) -> Program:
    """Export the trained module, with its learned ranges."""
    program = float_program(trained, context, "trained")
    if program.path is None:
        raise program.error or TechniqueError("the trained model has no program")
    write_learned_state(module, program.path, evaluator.peaks)
    return program


def _training_warnings(fitted: TrainingResult) -> list[str]:
    stopped = [f"training ended early: {fitted.stopped}"] if fitted.stopped else []
    return [*([fitted.few_steps] if fitted.few_steps else []), *stopped]


def training_effect(fitted: TrainingResult, metric: str, samples: int) -> str:
    """Return a sentence on the effect of training over converting the untrained weights."""
    before, after = fitted.quality_before, fitted.quality
    if before is None or after is None:
        return ""
    where = f"on the {samples} selection samples"
    if fitted.best_epoch == 0 or after == before:
        back = ": the weights before training are kept" if fitted.best_epoch == 0 else f": {metric} stays {after:.4f}"
        return f"No improvement by training over post-training static quantization {where}{back}."
    return (
        f"Training changed {metric} by {after - before:+.4f} over post-training static quantization {where} "
        f"({before:.4f} to {after:.4f}, epoch {fitted.best_epoch})."
    )


def _as_training(request: QuantizeRequest, params: Qat) -> TrainingRequest:
    """Convert the request to that of a verb that trains."""
    common = {name: getattr(request, name) for name in ModelRequest.model_fields}
    return TrainingRequest(**common, **{name: getattr(params, name) for name in TrainingFields.model_fields})


def _training_data(
    asked: TrainingRequest, params: Qat, loaded: LoadedModel, original: nn.Module, selection: Samples, live: Live
) -> _TrainingData:
    statistics = loaded.samples("train", STATISTICS_SAMPLES)
    if not loaded.data.real or not statistics.count:
        raise DataError(
            "scheme qat needs training data",
            "the data gave no batch for split 'train'" if loaded.data.real else "no data was given",
            "give data whose load('train') returns the training samples; scheme static needs none",
        )
    loss = loss_for(asked, loaded, original, statistics, live)
    if loss is None and params.distill is False:
        raise DataError(
            "there is no training objective",
            "the training data has no targets, and distillation from the float model is off",
            "let the batches include targets, or leave distill out",
        )
    notes = overlap_notes(statistics, "for training", loaded)
    shared = shared_samples(selection, statistics)
    if shared > selection.count * OVERLAP:
        notes.append(
            f"{shared} of the {selection.count} samples that select the epoch are also training samples: "
            "let load('calibration') give others"
        )
    several = len(loaded.outputs.compared) > 1  # labels cover one output; the others are distilled
    distills = (loss is None or several) if params.distill is None else params.distill
    return _TrainingData(Batches(loaded.data, original, loaded.signature, loaded.outputs), loss, distills, notes)


def _scaling(params: Qat, context: RunContext, loaded: LoadedModel, program: Program, splits: Splits) -> ChannelScaling:
    if program.path is None or not params.equalize:
        return ChannelScaling()
    batches, threads = splits.calibration.batches, loaded.bench.threads
    return compute_scaling(program.path, static_of(params), batches, _scratch_folder(context), threads)


def _simulation(params: Qat, scaling: ChannelScaling) -> IntegerFormats:
    """Return the fake quantization that matches the conversion."""
    return IntegerFormats(
        per_channel=params.granularity == "per_channel",
        symmetric=params.symmetric,
        weight_levels=weight_levels(),
        targets=params.targets,
        ignore=params.ignore,
        factors={path: torch.from_numpy(array) for path, array in scaling.factors.items()},
    )


def _converted_evaluator(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    untrained: Path,
    splits: Splits,
    scaling: ChannelScaling,
) -> ConvertedEvaluator:
    limit_s = request.time_limit_s
    original = require_module(loaded, "quantize with scheme qat")
    metric = RequestedFunction(loaded.metric, loaded.policy, limit_s, loaded.outputs)
    evaluator = Evaluator.of(original, splits.selection, loaded.signature, metric)
    return ConvertedEvaluator(
        samples=evaluator.samples,
        signature=evaluator.signature,
        metric=evaluator.metric,
        outputs=evaluator.outputs,
        original=evaluator.original,
        limit_s=limit_s,
        params=_params_of(request),
        untrained=untrained,
        peaks=scaling.peaks,
        calibration=splits.calibration.batches,
        example=loaded.example,
        scratch=_scratch_folder(context),
        threads=loaded.bench.threads,
        seed=request.seed,
    )


def _scratch_folder(context: RunContext) -> Path:
    folder = context.work / "qat_evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedEvaluator(Evaluator):
    """Evaluator that exports and quantizes a module and runs the program in ONNX Runtime on the CPU."""

    params: Qat
    untrained: Path
    """Program of the module before training."""
    peaks: Peaks
    """Peaks that cross-layer equalization scales channels by."""
    calibration: Sequence[Any]
    """Batches for calibration."""
    example: dict[str, Any]
    """Two samples, for the export."""
    scratch: Path
    """An existing folder."""
    threads: int = 1
    seed: int = 0

    def score(self, module: nn.Module) -> float:
        """Return the metric of the converted program; `COLLAPSED` where the module's outputs are not finite.

        Raises:
            OmgoptimError: it cannot be converted, or as `Evaluator.score`.
        """
        plain = plain_of(module)
        if not self.usable(self.outputs_of(plain)):  # no range could be calibrated: the training failed, not the run
            return COLLAPSED
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            return self.value_of(self._converted(module, plain, Path(folder)))

    def _converted(self, module: nn.Module, plain: nn.Module, folder: Path) -> list[Any]:
        """Return the outputs of the converted program."""
        from omgoptim.runtimes.export import export_onnx

        exported, converted = self.untrained, folder / PROGRAM
        if was_trained(module):
            exported = folder / "float.onnx"
            export_onnx(plain, as_tensors(self.example, self.signature.dtypes), self.signature, exported)
            write_learned_state(module, exported, self.peaks)
        run = ProgramRun(self.calibration, folder, self.seed, self.threads)
        apply_to_program(exported, converted, self.params, run)
        session = ENGINES["onnxruntime"].open(converted, self.signature, SessionSettings(self.threads))
        return [session.run(batch) for batch in self.samples.batches]


def was_trained(module: nn.Module) -> bool:
    """Return whether training has changed a module's weights."""
    return not isinstance(module, FakeQuantized) or int(module.steps_done) > 0


def write_learned_state(module: nn.Module, program: Path, peaks: Peaks) -> None:
    """Store the learned ranges and scales of a trained module in its program."""
    if isinstance(module, FakeQuantized):
        write_qat_state(program, QatState(module.ranges(), peaks))


def plain_of(module: nn.Module) -> nn.Module:
    """Return a copy of the wrapped module on the CPU in eval mode."""
    inside = module.module if isinstance(module, FakeQuantized) else module
    return copy.deepcopy(inside).cpu().eval()
