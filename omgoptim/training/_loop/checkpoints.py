"""Checkpoints of the training loop: one file per round, written atomically, without code.

`torch.save` of tensors and plain values, read with `weights_only=True`. A training goes on only from a checkpoint of
the same config, module, round and loss; any other is refused, never overwritten.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import ArtifactError, RunError
from omgoptim.reports import Epoch

FORMAT = 1
"""Version of the checkpoint file; a file of another version is refused."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a training after an epoch; data and seeds follow from the config."""

    identity: dict[str, Any]
    """Values that must match those of a training that resumes from this."""
    state: dict[str, Tensor]
    """All parameters and buffers."""
    best: dict[str, Tensor]
    """Trained tensors at their best; empty where that is `state` itself."""
    best_epoch: int
    """Epoch of the best weights; 0 for those before training."""
    scores: list[float]
    """Scores of the evaluator, beginning before training; empty without one."""
    epochs: list[dict[str, Any]]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    """State of the fp16 gradient scaler; empty without one."""
    stopped: str | None
    seconds: float
    resumed: int
    adapters: dict[str, Tensor] = field(default_factory=dict)
    """Adapters of the feature loss: trained, and not part of the module."""
    teacher_outputs: str | None = None
    """Note on caching of the teacher's outputs."""

    @property
    def records(self) -> list[Epoch]:
        return [Epoch.model_validate(record) for record in self.epochs]


def checkpoint_file(folder: Path, round_number: int) -> Path:
    """Return the checkpoint file of a round: a run of several rounds has one each in the same folder."""
    return folder / f"round_{round_number:03d}.pt"


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint under a temporary name, then rename it: a killed process leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **asdict_shallow(checkpoint)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """Read the checkpoint of this training to the CPU; None where there is none.

    Raises:
        ArtifactError: the file is damaged or of another version.
        RunError: it belongs to another training.
    """
    if not path.is_file():
        return None
    start_over = f"use another checkpoint folder, or delete {path} to start over"
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        written = record.pop("format")
        if written != FORMAT:
            raise ArtifactError(
                f"checkpoint {path} was written by another version of omgoptim", f"format {written}", start_over
            )
        checkpoint = Checkpoint(**record)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"checkpoint {path} cannot be read", str(error).splitlines()[0], start_over) from error
    except pickle.UnpicklingError as error:  # objects other than tensors and plain values: never loaded
        raise ArtifactError(f"{path} is not a checkpoint", str(error).splitlines()[0], start_over) from error
    differing = [
        f"{name} was {checkpoint.identity.get(name)!r} and is {identity.get(name)!r} now"
        for name in sorted({*identity, *checkpoint.identity})
        if checkpoint.identity.get(name) != identity.get(name)
    ]
    if differing:
        raise RunError(
            f"checkpoint {path} is of a training with other settings",
            "; ".join(text[:200] for text in differing[:4]),
            start_over,
        )
    return checkpoint


def asdict_shallow(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields by name; the tensors are not copied."""
    return {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}


def config_fields(config: Any) -> dict[str, Any]:
    """Return a config's fields for an identity, under the prefix that files have had from the first version on."""
    return {f"plan.{name}": value for name, value in asdict(config).items()}


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, non-persistent ones too; shared ones once. No copies."""
    return {**{name: parameter.data for name, parameter in module.named_parameters()}, **dict(module.named_buffers())}


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained tensors: parameters with a gradient, and every buffer."""
    changing = {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in {**changing, **dict(module.named_buffers())}.items()}


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into a module's tensors, in place: an optimizer goes on with the same parameters.

    A buffer that is new, gone or of another size is a cache, and ignored.
    """
    tensors_of_module = all_tensors(module)
    with torch.no_grad():
        for name, saved in tensors.items():
            if name in tensors_of_module and tensors_of_module[name].shape == saved.shape:
                tensors_of_module[name].copy_(saved)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return each parameter's shape by name, for an identity."""
    return {f"shape of {name}": list(parameter.shape) for name, parameter in module.named_parameters()}
