"""Checkpoints of a run of rounds, from which an interrupted run resumes."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from omgoptim.models.structural_diff import StructuralDiff, apply_diff, compute_diff
from omgoptim.reports import Change, Epoch, Round, Skip, Training
from omgoptim.runtimes.torch_precision import load_state, state_of
from omgoptim.techniques.registry import Outcome
from omgoptim.training.config import TrainingConfig
from omgoptim.training.loop import TrainingResult

WEIGHTS, STATE = "weights.safetensors", "state.json"
TRAINING = (
    "quality",
    "loss",
    "optimizer",
    "trained_params",
    "total_params",
    "seconds",
    "resumed",
    "stopped",
    "teacher_outputs",
    "warnings",
)


@dataclass(slots=True)
class RoundState:
    """State of a module within a round."""

    module: nn.Module
    record: Round
    outcome: Outcome
    epochs: list[Epoch] = field(default_factory=list)
    quality: float = float("-inf")
    """Quality of the module on the selection samples; minus infinity if it has collapsed."""
    loss: str = ""
    """Description of the loss."""
    optimizer: str = ""
    """Description of the optimizer and its learning rate."""
    trained_params: int = 0
    total_params: int = 0
    """Parameters during training, adapters included."""
    seconds: float = 0.0
    resumed: int = 0
    stopped: str | None = None
    teacher_outputs: str | None = None
    """Description of the caching of the teacher's outputs."""
    warnings: list[str] = field(default_factory=list)
    """Warnings of its training."""


def record_training(state: RoundState, fitted: TrainingResult) -> None:
    """Copy the result of a training into the state; without a quality the caller evaluates it."""
    state.epochs, state.stopped, state.loss = fitted.epochs, fitted.stopped, fitted.loss
    state.optimizer = fitted.optimizer
    state.trained_params, state.total_params = fitted.trained_params, fitted.total_params
    state.seconds, state.resumed = fitted.seconds, fitted.resumed
    few = [fitted.few_steps] if fitted.few_steps else []
    state.teacher_outputs, state.warnings = fitted.teacher_outputs, [*fitted.notes, *few]
    if fitted.quality is not None:
        state.quality = fitted.quality


def training_of(states: Sequence[RoundState], plan: TrainingConfig, metric: str) -> Training | None:
    """Summarize the training of all rounds for the report; None if nothing was trained."""
    epochs = [epoch for state in states for epoch in state.epochs]
    if not epochs and not any(state.stopped for state in states):
        return None
    last = states[-1]
    return Training(
        epochs=epochs,
        optimizer=last.optimizer or plan.summary,
        loss=last.loss,
        trained_params=last.trained_params,
        total_params=last.total_params,
        metric=metric,
        seconds=sum(state.seconds for state in states),
        resumed=sum(state.resumed for state in states),
        stopped=next((state.stopped for state in reversed(states) if state.stopped), None),
        teacher_outputs=last.teacher_outputs,
    )


def write_round(folder: Path, state: RoundState, original: nn.Module) -> None:
    """Write a state atomically."""
    from safetensors.torch import save_file

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    structural_diff = compute_diff(original, state.module)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state_of(state.module).items()}
    save_file(tensors, partial / WEIGHTS)
    stored = {
        "structural_diff": structural_diff.to_json() if structural_diff else None,
        "record": state.record.model_dump(mode="json"),
        "changed": [change.model_dump() for change in state.outcome.changed],
        "skipped": [skip.model_dump() for skip in state.outcome.skipped],
        "notes": state.outcome.notes,
        "epochs": [epoch.model_dump(mode="json") for epoch in state.epochs],
        "training": {name: getattr(state, name) for name in TRAINING},
    }
    (partial / STATE).write_text(json.dumps(stored))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_round(folder: Path, original: nn.Module) -> RoundState | None:
    """Read a state and build its module from the original; None if there is none."""
    from safetensors.torch import load_file

    if not (folder / STATE).is_file():
        return None
    stored = json.loads((folder / STATE).read_text())
    module = copy.deepcopy(original)
    structural_diff = stored.get("structural_diff", stored.get("surgery"))  # the key of older checkpoints
    if structural_diff is not None:
        apply_diff(module, StructuralDiff.from_json(structural_diff))
    load_state(module, load_file(folder / WEIGHTS))
    outcome = Outcome(
        [Change.model_validate(change) for change in stored["changed"]],
        [Skip.model_validate(skip) for skip in stored["skipped"]],
        list(stored["notes"]),
    )
    epochs = [Epoch.model_validate(epoch) for epoch in stored["epochs"]]
    return RoundState(module, Round.model_validate(stored["record"]), outcome, epochs, **stored["training"])
