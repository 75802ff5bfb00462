"""Expected seconds of steps: from one load, one timing launch and one training batch, then from the steps so far."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from omgoptim.errors import OmgoptimError
from omgoptim.models.data import DataSource
from omgoptim.models.forward import NamedBatch
from omgoptim.models.samples import forward_args
from omgoptim.models.security.user_code import call_user
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.points import StepResult
from omgoptim.runtimes.signature import Signature
from omgoptim.training.batches import Batches
from omgoptim.training.config import BATCH
from omgoptim.training.losses import tensor_outputs
from omgoptim.training.modes import own_randomness

FINAL_SHARE = 0.15
"""Share of the budget that is held back for the final measurement. Chosen (docs/optimize.md)."""

COUNTING_S = 10.0
"""Longest time in which the samples of an epoch are counted."""

Kept = TypeVar("Kept")

QUANTIZE_LAUNCHES, TRAINED_LAUNCHES, FINAL_LAUNCHES = 16, 4, 12
"""Timing launches of a quantize step, of a step that trains, and of the final measurement."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that parts of a step take, each measured once."""

    prepared_s: float
    """Everything before the first step."""
    load_s: float
    """Loading the model and its data."""
    launch_s: float
    """Launching and timing one artifact."""
    epoch_s: float | None
    """An epoch of training with the original as the teacher; None where nothing can be trained."""

    def quantize_s(self, taken: Sequence[StepResult]) -> float:
        """Return the seconds of a quantize step: those of the first one, or an estimate before it."""
        done = [point.seconds for point in taken if point.verb == "quantize" and point.seconds]
        return done[0] if done else self.load_s + QUANTIZE_LAUNCHES * self.launch_s

    def trained_s(self, taken: Sequence[StepResult], epochs: int) -> float:
        """Return the seconds of a step with so many epochs, by the slowest so far, or an estimate before any."""
        measured = []
        overhead, epoch = self.load_s + TRAINED_LAUNCHES * self.launch_s, self.epoch_s or 0.0
        for point in taken:
            training = point.run.report.training
            if training and training.epochs and point.seconds:
                measured.append((point.seconds - training.seconds, training.seconds / len(training.epochs)))
        if measured:
            overhead, epoch = (max(0.0, *seconds) for seconds in zip(*measured, strict=True))
        return overhead + epochs * epoch

    def final_s(self, launches: int) -> float:
        """Return what the final measurement takes.

        Args:
            launches: of each of the finalists and the original.
        """
        return FINAL_LAUNCHES / 2 * launches * self.launch_s

    def finalists(self, left_s: float, most: int) -> int:
        """Return the number of artifacts that can be launched twice in the remaining time; at least two."""
        return min(most, max(2, int(left_s / (2 * max(self.launch_s, 1e-3))) - 1))


def measured_once(file: Path, kind: Callable[..., Kept], measure: Callable[[], Kept]) -> Kept:
    """Return a quantity that was measured before the run was interrupted; else measure and store it.

    Args:
        file: JSON file in the run's folder.
        kind: its dataclass, of plain JSON values.
        measure: measures it.
    """
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(found)), encoding="utf-8")  # type: ignore[call-overload]
        return found


def epoch_seconds(loaded: LoadedModel, data: DataSource, limit_s: float) -> float | None:
    """Time forward and backward of one batch, and count the samples of an epoch; None where that cannot be run.

    An epoch that is not counted within `COUNTING_S` is as long as what was counted, at least.

    Args:
        loaded: the original.
        data: with the train split.
        limit_s: seconds that the user's code may take.
    """
    if loaded.module is None:
        return None
    module = copy.deepcopy(loaded.module).train()
    batches = Batches(data, module, loaded.signature, loaded.outputs)
    began = time.perf_counter()
    samples = 0
    try:
        with own_randomness():
            first = None
            for batch in batches.epoch(BATCH):
                first, samples = first or batch, samples + batch.size
                if time.perf_counter() - began > COUNTING_S:
                    break
            counted_s = time.perf_counter() - began
            if first is None:
                return None
            inputs = {name: tensor.numpy() for name, tensor in first.inputs.items()}
            seconds = call_user("timing a training batch", limit_s, _batch_seconds, module, loaded.signature, inputs)
    except OmgoptimError:  # the step that trains will say why
        return None
    return counted_s + seconds * samples / max(first.size, 1)


def _batch_seconds(module: nn.Module, signature: Signature, inputs: NamedBatch) -> float:
    """Return the seconds of the teacher's forward, and of forward and backward; the faster of two."""
    args, kwargs = forward_args(signature, inputs)
    seconds = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with torch.no_grad():
            module(*args, **kwargs)
        outputs = [leaf for leaf in tensor_outputs(module(*args, **kwargs)) if leaf.requires_grad]
        loss = sum((leaf.float().mean() for leaf in outputs), torch.zeros(()))
        if outputs:
            torch.autograd.backward(loss)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
