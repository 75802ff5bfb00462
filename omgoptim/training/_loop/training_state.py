"""State of one training: its epochs, the best weights so far, the checkpoint to resume from, and its progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.reports import Epoch
from omgoptim.training._distillation.teacher_outputs import EVERY, cache_outputs
from omgoptim.training._loop.checkpoints import Checkpoint, all_tensors, put_tensors, trained_tensors
from omgoptim.training._loop.steps import PreparedTraining, from_first
from omgoptim.training.batches import Batch, Batches
from omgoptim.training.evaluator import Evaluator, distance_to_original
from omgoptim.training.modes import seed_everything

Progress = Callable[[str, "float | None"], None]
"""`progress(stage, fraction of this training)`."""


@dataclass(slots=True)
class ProgressReporter:
    """Progress reporter of one epoch: at most one message a second, with the loss and the time left."""

    progress: Progress
    epochs: int
    epoch: int
    count: int
    started: float = field(default_factory=time.perf_counter)
    last: float = 0.0

    def __call__(self, done: int, loss: float) -> None:
        now = time.perf_counter()
        if done < self.count and now - self.last < 1.0:
            return
        self.last = now
        fraction = min(done / max(self.count, 1), 1.0)
        eta = (now - self.started) / max(fraction, 1e-9) * (self.epochs - self.epoch + 1 - fraction)
        text = f"training: epoch {self.epoch} of {self.epochs}, loss {loss:.4g}, eta {eta:.0f} s"
        self.progress(text, (self.epoch - 1 + fraction) / self.epochs)


@dataclass(slots=True)
class TrainingState:
    """State of one training."""

    module: nn.Module
    steps: PreparedTraining
    evaluator: Evaluator | None
    round_number: int
    records: list[Epoch] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Scores of the evaluator, beginning before training."""
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    stopped: str | None = None
    seconds: float = 0.0
    resumed: int = 0
    teacher_outputs: str | None = None

    @property
    def epoch(self) -> int:
        return len(self.records)

    @property
    def is_running(self) -> bool:
        return self.stopped is None and self.epoch < self.steps.config.epochs

    def begin(self, score: float | None, checkpoint: Checkpoint | None) -> None:
        """Start from the untrained state as the first candidate, or from a checkpoint.

        Args:
            score: the evaluator's of the untrained state, where that is known.
            checkpoint: to resume from; None to begin.
        """
        if checkpoint is None:
            self.best = trained_tensors(self.module)
            if self.evaluator is not None:
                self.scores = [self.evaluator.score(self.module) if score is None else score]
            return
        put_tensors(self.module, checkpoint.state)
        features = self.steps.loss_fn.features
        if features is not None:
            put_tensors(features, checkpoint.adapters)
        saved = checkpoint.best or {name: checkpoint.state[name] for name in trained_tensors(self.module)}
        self.best = {name: tensor.to(self.steps.device) for name, tensor in saved.items()}
        self.records, self.scores = checkpoint.records, list(checkpoint.scores)
        self.best_epoch, self.stopped = checkpoint.best_epoch, checkpoint.stopped
        self.seconds, self.resumed = checkpoint.seconds, checkpoint.resumed + self.is_running
        self.teacher_outputs = checkpoint.teacher_outputs
        self.steps.restore(checkpoint)

    def cache_teacher_outputs(self, batches: Batches, count: int, first: Batch, progress: Progress) -> None:
        """Cache the teacher's outputs for all samples where that is possible and saves time."""
        started, loss_fn = time.perf_counter(), self.steps.loss_fn
        if loss_fn.features is not None:
            self.teacher_outputs = f"{EVERY}: feature distillation needs its activations too"
        elif loss_fn.learns_outputs:
            loss_fn.cache, self.teacher_outputs = cache_outputs(
                batches,
                self.steps.config,
                count,
                first,
                lambda batch: loss_fn.learned_outputs(batch.to(self.steps.device)),
                progress,
            )
        self.seconds += time.perf_counter() - started

    def run_epoch(self, batches: Batches, count: int, progress: Progress) -> None:
        """Train for one more epoch, evaluate it, and keep its weights if they are the best.

        Args:
            batches: of the train split.
            count: batches in an epoch.
            progress: `progress(stage, fraction)`.
        """
        config, started, epoch = self.steps.config, time.perf_counter(), self.epoch + 1
        seed_everything(config.seed, self.round_number, epoch)
        loss = self.steps.epoch(batches.epoch(config.batch), ProgressReporter(progress, config.epochs, epoch, count))
        score = None
        if not math.isfinite(loss):
            self.stopped = f"the loss was {loss:g} in epoch {epoch}; the weights {self._best_epoch_name} were restored"
        elif not all(bool(torch.isfinite(parameter).all()) for parameter in self.steps.parameters):
            self.stopped = (
                f"a weight was NaN or infinite in epoch {epoch}; the weights {self._best_epoch_name} were restored"
            )
        else:
            score = from_first(self.evaluator.score(self.module) if self.evaluator else None, self.steps.ranks)
            if score is None or self._is_best(score):
                self.best, self.best_epoch = trained_tensors(self.module), epoch
            if score is not None:
                self.scores.append(score)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.records.append(
            Epoch(
                round=self.round_number,
                epoch=epoch,
                loss=loss if math.isfinite(loss) else None,
                quality=score if score is not None and math.isfinite(score) else None,
                learning_rate=self.steps.last_rate,
                seconds=seconds,
            )
        )
        if self.is_running and config.patience and score is not None:
            waited = epoch - self.scores.index(max(self.scores))  # an equal score is no better one
            if waited >= config.patience:
                self.stopped = f"early stopping: no better quality for {waited} epoch{'s' if waited > 1 else ''}"

    def _is_best(self, score: float) -> bool:
        """Return whether the current weights replace the best so far.

        Of equal scores the later one does. But a metric of few samples (accuracy on 60) often cannot distinguish the
        trained state from the untrained one; then the weights whose outputs are nearer to the original's are kept.
        """
        assert self.evaluator is not None  # it gave the score
        highest = max(self.scores)
        if score != highest or self.best_epoch or not math.isfinite(score):
            return score >= highest
        after = distance_to_original(self.evaluator, self.module)
        trained = trained_tensors(self.module)
        put_tensors(self.module, self.best)
        before = distance_to_original(self.evaluator, self.module)
        put_tensors(self.module, trained)
        return after <= before

    def checkpoint(self, identity: dict[str, Any]) -> Checkpoint:
        """Return a checkpoint with everything that the further epochs depend on."""
        features = self.steps.loss_fn.features
        return Checkpoint(
            identity=identity,
            state=all_tensors(self.module),
            best={} if self.best_epoch == self.epoch else self.best,
            best_epoch=self.best_epoch,
            scores=self.scores,
            epochs=[record.model_dump() for record in self.records],
            stopped=self.stopped,
            seconds=self.seconds,
            resumed=self.resumed,
            adapters=all_tensors(features) if features is not None else {},
            teacher_outputs=self.teacher_outputs,
            **self.steps.state(),
        )

    @property
    def _best_epoch_name(self) -> str:
        return f"of epoch {self.best_epoch}" if self.best_epoch else "from before training"
