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
    """Those that training changes, at their best; empty where that is `state` itself."""
    best_epoch: int
    """0: as they were before training."""
    scores: list[float]
    """The evaluator's, from before training on; empty without one."""
    epochs: list[dict[str, Any]]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    """Of fp16 gradients; empty without."""
    stopped: str | None
    seconds: float
    resumed: int
    adapters: dict[str, Tensor] = field(default_factory=dict)
    """Between layers of a student and its teacher: trained, and no part of the module."""
    teacher_outputs: str | None = None
    """Whether the teacher's were kept, in words."""

    @property
    def records(self) -> list[Epoch]:
        return [Epoch.model_validate(record) for record in self.epochs]


def checkpoint_file(folder: Path, round_number: int) -> Path:
    """The file of a round's training: a run of several rounds has one of each in the same folder."""
    return folder / f"round_{round_number:03d}.pt"


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it under another name, then put it in its place: a process that dies leaves the one before."""
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
    """The checkpoint of this training, on the CPU; None where there is none.

    Raises:
        ArtifactError: the file is damaged or of another version.
        RunError: it belongs to another training.
    """
    if not path.is_file():
        return None
    start_over = f"train with another checkpoint folder, or delete {path} to start over"
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
        raise ArtifactError(f"checkpoint {path} is none", str(error).splitlines()[0], start_over) from error
    differing = [
        f"{name} was {checkpoint.identity.get(name)!r} and is {identity.get(name)!r}"
        for name in sorted({*identity, *checkpoint.identity})
        if checkpoint.identity.get(name) != identity.get(name)
    ]
    if differing:
        raise RunError(
            f"checkpoint {path} belongs to another training",
            "; ".join(text[:200] for text in differing[:4]),
            start_over,
        )
    return checkpoint


def asdict_shallow(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its fields by name; the tensors are not copied."""
    return {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}


def plain(config: Any) -> dict[str, Any]:
    """Return a config's fields for an identity, under the prefix that files have had from the first version on."""
    return {f"plan.{name}": value for name, value in asdict(config).items()}


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not persistent too; shared ones once. No copies."""
    return {
        **{name: parameter.data for name, parameter in module.named_parameters()},
        **dict(module.named_buffers()),
    }


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: parameters with a gradient, and every buffer."""
    changing = {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in {**changing, **dict(module.named_buffers())}.items()}


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved values into a module's own tensors, in place: an optimizer goes on with the same parameters.

    A buffer that has come, gone or changed its size since is a cache, and left alone.
    """
    own = all_tensors(module)
    with torch.no_grad():
        for name, saved in tensors.items():
            if name in own and own[name].shape == saved.shape:
                own[name].copy_(saved)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Name of each parameter to its shape, for an identity."""
    return {f"shape of {name}": list(parameter.shape) for name, parameter in module.named_parameters()}
