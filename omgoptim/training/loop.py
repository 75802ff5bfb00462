"""The training loop, on Hugging Face Accelerate: fine-tuning, distillation and recovery all use it.

The weights with the best score are kept, the untrained ones included: training that only hurts is undone. With its
checkpoint after each epoch, a killed and resumed training ends with the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.errors import RequestError, TechniqueError, argument
from omgoptim.reports import Epoch
from omgoptim.training._loop.checkpoints import (
    checkpoint_file,
    config_fields,
    put_tensors,
    read_checkpoint,
    shapes,
    write_checkpoint,
)
from omgoptim.training._loop.combined_loss import CombinedLoss
from omgoptim.training._loop.steps import PreparedTraining, from_first, prepared_steps
from omgoptim.training._loop.training_state import Progress, TrainingState
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingConfig, few_steps_note, optimizer_steps
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.evaluator import Evaluator
from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.losses import Loss
from omgoptim.training.modes import own_randomness, teacher_mode, train_mode
from omgoptim.training.trainable_weights import ZeroMasks


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of one training; the weights are in the module."""

    epochs: list[Epoch]
    """All epochs, those before a resume too. `best` marks the one whose weights are kept; none where training only
    hurt, and the weights are those before it.
    """
    quality: float | None
    """Score of the kept weights; None without an evaluator."""
    quality_before: float | None
    """Score before training."""
    best_epoch: int
    """Epoch of the kept weights; 0 for those before training."""
    loss: str
    """Description of the minimized loss."""
    optimizer: str
    trained_params: int
    total_params: int
    seconds: float
    stopped: str | None = None
    """Reason for an end before the last epoch."""
    resumed: int = 0
    """Number of resumes from a checkpoint."""
    teacher_outputs: str | None = None
    """Note on caching of the teacher's outputs; None where the loss does not use them."""
    few_steps: str | None = None
    """Warning about few training samples, with the number of steps; None where there were enough."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Objective:
    """The minimized loss: on the targets, of distances to a teacher, or a sum of both."""

    loss: Loss | None = None
    """Loss on the targets; None to learn from the teacher alone."""
    teacher: nn.Module | None = None
    """Not changed. Its outputs are computed once for each sample where the inputs are the same in every epoch, and
    there are several."""
    distillation: DistillationLoss | None = None
    """Distance to the teacher's outputs; None: the default one, if there is a teacher."""
    features: FeatureLoss | None = None
    """Distance to the teacher's layers; its adapters are trained, and stay in it."""

    def check(self, target: Any) -> None:
        """Raise for a target that does not fit the loss on the targets, if there is one."""
        if self.loss is not None:
            self.loss.check(target)


@dataclass(frozen=True, slots=True)
class TrainingRound:
    """The round of compression that a training belongs to."""

    number: int = 1
    """Number of the round, from 1; part of the seed."""
    checkpoints: Path | None = None
    """Folder for one file per round; a training found there goes on after its last whole epoch."""
    masks: ZeroMasks | None = None
    """Weights that stay zero."""
    score: float | None = None
    """The evaluator's score of the module as it is, where that is known."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """Training of a module in place."""

    module: nn.Module
    batches: Batches
    """Batches of the train split."""
    objective: Objective
    config: TrainingConfig
    evaluator: Evaluator | None = None
    """Metric that best weights and early stopping go by."""

    def fit(
        self,
        at: TrainingRound = TrainingRound(),
        progress: Progress = lambda _stage, _done: None,
        on_epoch: Callable[[Epoch], None] = lambda _epoch: None,
    ) -> TrainingResult:
        """Train the module; it comes back on the CPU, in its former modes, with the best weights.

        Best is the highest score of the evaluator, among the weights before training and after each epoch; of equal
        scores the latest, but one that only equals the score before training has to be as near to the outputs of the
        original, too. Without an evaluator the weights after the last epoch are kept. A loss or a weight that is not
        finite ends the training with the best weights so far. Parameters that do not require a gradient stay as they
        are, and batch normalization with frozen parameters keeps its mode.

        Each epoch begins with torch, numpy and random seeded from the config's seed, the round and the epoch; the
        caller's random state is restored at the end. Data with a random state of its own (a DataLoader's `generator`)
        starts anew in a resumed process.

        Args:
            at: the round of compression and training.
            progress: called about once a second, with the loss and the time left.
            on_epoch: called after each epoch with its record.

        Raises:
            RequestError: fp16 on a CPU.
            DataError: the train data does not fit the model or the loss, or the teacher's outputs not the module's;
                found on the first pass, before any step.
            TechniqueError: nothing can be trained: no parameter requires a gradient, or there is no loss and no
                teacher; the distance to the teacher is of a kind that its outputs are not for.
            RunError, ArtifactError: the checkpoint belongs to another training, or is damaged.
            SetupError: accelerate is not installed.
            UserCodeError: the user's data or loss failed.
        """
        module, batches, objective, config = self.module, self.batches, self.objective, self.config
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        _check_trainable(config, parameters, objective)
        adapters = [] if objective.features is None else list(objective.features.parameters())
        with own_randomness(), train_mode(module), teacher_mode(objective.teacher, config.device):
            loss_fn = _combined(objective, module, batches)
            count, first = batches.survey(config.batch, config.seed, objective.check) if config.epochs else (0, None)
            total = optimizer_steps(config, count)
            with prepared_steps(module, [*parameters, *adapters], config, total, loss_fn, at.masks) as steps:
                if first is not None:
                    loss_fn.resolve(module, first.to(steps.device))
                identity = _identity(module, steps, self.evaluator, at.number, count)
                path = checkpoint_file(at.checkpoints, at.number) if at.checkpoints else None
                if at.masks is not None:
                    at.masks.apply()
                state = TrainingState(module, steps, self.evaluator, at.number)
                state.begin(at.score, from_first(read_checkpoint(path, identity) if path else None, steps.ranks))
                if first is not None and state.is_running:
                    state.cache_teacher_outputs(batches, count, first, progress)
                while state.is_running:
                    state.run_epoch(batches, count, progress)
                    on_epoch(state.records[-1])
                    if path:
                        write_checkpoint(path, state.checkpoint(identity))
                if state.best_epoch != state.epoch or state.stopped:
                    put_tensors(module, state.best)
        for parameter in [*module.parameters(), *adapters]:
            parameter.grad = None
        note = few_steps_note(total, batches.samples(config.batch), config) if config.epochs else None
        return _result(module, state, config, loss_fn.name, parameters, note)


def _combined(objective: Objective, module: nn.Module, batches: Batches) -> CombinedLoss:
    """Return the loss of a batch as a function of the module."""
    teacher, distillation = objective.teacher, objective.distillation
    if objective.features is not None and teacher is None:
        raise ValueError("feature distillation needs a teacher")
    if teacher is not None and distillation is None:
        distillation = DistillationLoss()
    return CombinedLoss(
        batches.signature, objective.loss, teacher, distillation, objective.features, module, outputs=batches.outputs
    )


def _identity(
    module: nn.Module, steps: PreparedTraining, evaluator: Evaluator | None, round_number: int, count: int
) -> dict[str, Any]:
    """Return the values that a checkpoint must share with this training to be resumed.

    Args:
        module: before training.
        steps: with the optimizer and its config.
        evaluator: that weights are chosen by; None without.
        round_number: of the training.
        count: batches in an epoch.
    """
    features = steps.loss_fn.features
    return {
        **config_fields(steps.config),
        **shapes(module),
        "round": round_number,
        "metric": evaluator.metric.name if evaluator else None,
        "loss": steps.loss_fn.name,
        "features": features.names if features is not None else None,
        "trained": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
        "batches per epoch": count,
        "weights held at zero": steps.masks.count() if steps.masks else 0,
    }


def _check_trainable(config: TrainingConfig, parameters: list[nn.Parameter], objective: Objective) -> None:
    if config.mixed_precision == "fp16" and config.device == "cpu":
        raise RequestError(
            "fp16 mixed precision needs a GPU",
            "fp16 gradients need loss scaling, which torch supports on GPUs",
            f"use {argument('mixed_precision', 'bf16')} or {argument('mixed_precision', 'no')}",
        )
    if config.epochs and not parameters:
        raise TechniqueError(
            "the model has no trainable parameter",
            "requires_grad is False for all of its parameters",
            f"unfreeze some (parameter.requires_grad_(True)), or use {argument('epochs', 0)}",
        )
    if config.epochs and objective.loss is None and objective.teacher is None:
        raise TechniqueError(
            "there is neither a target nor a teacher to train with",
            "the training data has no targets, and distillation from the original model is off",
            "give targets, or turn distill on",
        )


def _result(
    module: nn.Module,
    state: TrainingState,
    config: TrainingConfig,
    loss: str,
    trained: list[nn.Parameter],
    few_steps: str | None,
) -> TrainingResult:
    notes = []
    if state.best_epoch == 0 and state.records and state.stopped is None:
        notes.append("training did not improve quality: the weights from before it were restored")
    records = [record.model_copy(update={"best": record.epoch == state.best_epoch}) for record in state.records]
    return TrainingResult(
        epochs=records,
        quality=max(state.scores) if state.scores else None,
        quality_before=state.scores[0] if state.scores else None,
        best_epoch=state.best_epoch,
        loss=loss,
        optimizer=config.summary,
        trained_params=sum(parameter.numel() for parameter in trained),
        total_params=sum(parameter.numel() for parameter in module.parameters()),
        seconds=state.seconds,
        stopped=state.stopped,
        resumed=state.resumed,
        teacher_outputs=state.teacher_outputs,
        few_steps=few_steps,
        notes=notes,
    )
