"""Where a run of rounds stands, on disk: what a run that was cut off goes on from."""

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
class Stage:
    """A module on its way through a round, and what is known of it."""

    module: nn.Module
    record: Round
    outcome: Outcome
    epochs: list[Epoch] = field(default_factory=list)
    quality: float = float("-inf")
    """Of the module as it is now, on the selection samples; minus infinity if it has collapsed."""
    loss: str = ""
    """What was minimized, in words."""
    optimizer: str = ""
    """The optimizer with its learning rate, in words, as it was fitted to the data."""
    trained_params: int = 0
    total_params: int = 0
    """While it was trained, adapters included."""
    seconds: float = 0.0
    resumed: int = 0
    stopped: str | None = None
    teacher_outputs: str | None = None
    """Whether the teacher's outputs were computed once and kept, in words."""
    warnings: list[str] = field(default_factory=list)
    """What must be said of its training."""


def note_training(stage: Stage, fitted: TrainingResult) -> None:
    """Take over what a training did; the quality is the caller's to judge where there is none."""
    stage.epochs, stage.stopped, stage.loss = fitted.epochs, fitted.stopped, fitted.loss
    stage.optimizer = fitted.optimizer
    stage.trained_params, stage.total_params = fitted.trained_params, fitted.total_params
    stage.seconds, stage.resumed = fitted.seconds, fitted.resumed
    few = [fitted.few_steps] if fitted.few_steps else []
    stage.teacher_outputs, stage.warnings = fitted.teacher_outputs, [*fitted.notes, *few]
    if fitted.quality is not None:
        stage.quality = fitted.quality


def training_of(stages: Sequence[Stage], plan: TrainingConfig, metric: str) -> Training | None:
    """What was trained over all stages, for the report; None if nothing was."""
    epochs = [epoch for stage in stages for epoch in stage.epochs]
    if not epochs and not any(stage.stopped for stage in stages):
        return None
    last = stages[-1]
    return Training(
        epochs=epochs,
        optimizer=last.optimizer or plan.words,
        loss=last.loss,
        trained_params=last.trained_params,
        total_params=last.total_params,
        metric=metric,
        seconds=sum(stage.seconds for stage in stages),
        resumed=sum(stage.resumed for stage in stages),
        stopped=next((stage.stopped for stage in reversed(stages) if stage.stopped), None),
        teacher_outputs=last.teacher_outputs,
    )


def write_stage(folder: Path, stage: Stage, original: nn.Module) -> None:
    """Write a stage; the folder appears whole or not at all."""
    from safetensors.torch import save_file

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    surgery = compute_diff(original, stage.module)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state_of(stage.module).items()}
    save_file(tensors, partial / WEIGHTS)
    told = {
        "surgery": surgery.to_json() if surgery else None,
        "record": stage.record.model_dump(mode="json"),
        "changed": [change.model_dump() for change in stage.outcome.changed],
        "skipped": [skip.model_dump() for skip in stage.outcome.skipped],
        "notes": stage.outcome.notes,
        "epochs": [epoch.model_dump(mode="json") for epoch in stage.epochs],
        "training": {name: getattr(stage, name) for name in TRAINING},
    }
    (partial / STATE).write_text(json.dumps(told))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_stage(folder: Path, original: nn.Module) -> Stage | None:
    """The stage that was written there, its module built from the original; None if there is none."""
    from safetensors.torch import load_file

    if not (folder / STATE).is_file():
        return None
    told = json.loads((folder / STATE).read_text())
    module = copy.deepcopy(original)
    if told["surgery"] is not None:
        apply_diff(module, StructuralDiff.from_json(told["surgery"]))
    load_state(module, load_file(folder / WEIGHTS))
    outcome = Outcome(
        [Change.model_validate(change) for change in told["changed"]],
        [Skip.model_validate(skip) for skip in told["skipped"]],
        list(told["notes"]),
    )
    epochs = [Epoch.model_validate(epoch) for epoch in told["epochs"]]
    return Stage(module, Round.model_validate(told["record"]), outcome, epochs, **told["training"])
