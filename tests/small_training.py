"""Small nets, small data, and what the training loop takes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.data import DataSource, from_callable
from omgoptim.models.forward import first_forward, input_tensors, name_inputs
from omgoptim.models.samples import Samples
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes.signature import Signature
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingConfig
from omgoptim.training.evaluator import Evaluator
from omgoptim.training.loop import Objective, Trainer, TrainingResult, TrainingRound
from omgoptim.training.losses import Loss
from omgoptim.training.trainable_weights import ZeroMasks

LIMIT_S = 60.0


class Net(nn.Module):
    """Linear, batch norm, dropout: everything that has state or draws."""

    def __init__(self, inputs: int = 4, width: int = 16, outputs: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.relu(self.norm(self.fc(x)))))


def net(seed: int = 0, **arguments: Any) -> Net:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Net(**arguments).eval()


def blobs(count: int = 96, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre per class, in four dimensions."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(1).normal(size=(classes, 4)) * 1.5
    points = centres[labels] + random.normal(size=(count, 4))
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels)


def signature_of(module: nn.Module, inputs: Any) -> Signature:
    named = name_inputs(module, inputs)
    described = input_tensors([named])
    return first_forward(module, described, {name: tensor for name, tensor, _ in named})


def source(train: Any) -> DataSource:
    """Data whose train split is `train` (a Dataset is shuffled, a list is not), or what calling it gives."""

    def load(split: str) -> Any:
        return train() if callable(train) else train

    return from_callable(load, 8, LIMIT_S)


def batches_of(module: nn.Module, inputs: torch.Tensor, target: torch.Tensor | None) -> Batches:
    tensors = (inputs,) if target is None else (inputs, target)
    return Batches(source(TensorDataset(*tensors)), module, signature_of(module, inputs[:2]))


def evaluator_of(
    module: nn.Module, inputs: torch.Tensor, target: torch.Tensor | None, metric: str | Callable[..., Any] = "auto"
) -> Evaluator:
    (tensor,) = signature_of(module, inputs[:2]).inputs
    samples = Samples([{tensor.name: inputs.numpy()}], [None if target is None else target.numpy()])
    return Evaluator.of(
        module,
        samples,
        signature_of(module, inputs[:2]),
        RequestedFunction(metric, PathPolicy.of(Path.cwd(), []), LIMIT_S),
    )


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fit(
    module: nn.Module,
    batches: Batches,
    loss: Loss | None,
    config: TrainingConfig,
    evaluator: Evaluator | None,
    *,
    progress: Callable[..., None] = lambda _stage, _done: None,
    on_epoch: Callable[..., None] = lambda _epoch: None,
    checkpoints: Path | None = None,
    masks: ZeroMasks | None = None,
    round_number: int = 1,
    score: float | None = None,
    **taught: Any,
) -> TrainingResult:
    """Train a module; `taught` are the teacher, the distillation and the features of the objective."""
    trainer = Trainer(module, batches, Objective(loss, **taught), config, evaluator)
    return trainer.fit(TrainingRound(round_number, checkpoints, masks, score), progress, on_epoch)
