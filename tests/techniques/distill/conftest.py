"""A run of a technique on a module, as an operation would give it, and what a changed module is put through."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.forward import first_forward, input_tensors, name_inputs, to_numpy
from omgoptim.models.samples import Samples
from omgoptim.models.structural_diff import StructuralDiff, apply_diff, compute_diff
from omgoptim.runtimes.torch_precision import load_state, state_of
from omgoptim.techniques.registry import ModuleRun


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., ModuleRun]:
    """`run_of(module, *batches, real=True, seed=0)`: batches are what the module is called with."""

    def call(module: nn.Module, *batches: Any, real: bool = True, seed: int = 0) -> ModuleRun:
        named = [name_inputs(module, batch) for batch in batches]
        module.eval()
        signature = first_forward(module, input_tensors(named), {name: tensor for name, tensor, _ in named[0]})
        arrays = [{name: to_numpy(tensor) for name, tensor, _ in batch} for batch in named]
        return ModuleRun(
            signature=signature,
            statistics=Samples(arrays, [None] * len(arrays)),
            loss=lambda outputs, _: 0.5 * outputs.square().mean(),
            original=copy.deepcopy(module),
            scratch=tmp_path,
            seed=seed,
            real=real,
        )

    return call


@pytest.fixture
def drawn() -> Callable[..., Tensor]:
    """`drawn(*shape, seed=0)`: a normal tensor that is the same each time."""

    def call(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return call


@pytest.fixture
def outputs_of() -> Callable[[nn.Module, Any], Tensor]:
    """`outputs_of(module, x)`: the first tensor that it gives, in the mode that it is in."""

    def call(module: nn.Module, x: Any) -> Tensor:
        with torch.no_grad():
            result = module(**x) if isinstance(x, dict) else module(x)
        tensor: Tensor = result if isinstance(result, Tensor) else result[0]
        return tensor

    return call


@pytest.fixture
def reopened() -> Callable[[nn.Module, nn.Module], nn.Module]:
    """`reopened(teacher, student)`: the student as an artifact brings it back, from a copy of the teacher."""

    def call(teacher: nn.Module, student: nn.Module) -> nn.Module:
        fresh = copy.deepcopy(teacher)
        diff = compute_diff(fresh, student)
        assert diff is not None
        apply_diff(fresh, StructuralDiff.from_json(json.loads(json.dumps(diff.to_json()))))
        load_state(fresh, {name: tensor.clone() for name, tensor in state_of(student).items()})
        return fresh

    return call


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        made = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(made + self.short(x))


class _ResNet(nn.Module):
    """A stem and residual blocks of w, 2w and 4w channels: 173,842 parameters at w = 24 and one block each."""

    def __init__(self, width: int, blocks: Sequence[int], channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages = []
        for stage, count in enumerate(blocks):
            inputs, outputs = width << max(stage - 1, 0), width << stage
            stages.append(
                nn.Sequential(
                    _Block(inputs, outputs, 1 + (stage > 0)), *(_Block(outputs, outputs, 1) for _ in range(count - 1))
                )
            )
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width << (len(blocks) - 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@pytest.fixture
def resnet() -> Callable[..., nn.Module]:
    """`resnet(width=8, blocks=(1, 1, 1), channels=1)`: with statistics of some forwards, in eval mode."""

    def call(width: int = 8, blocks: Sequence[int] = (1, 1, 1), channels: int = 1) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            module = _ResNet(width, blocks, channels)
            for _ in range(30):
                module(torch.randn(16, channels, 12, 12))
        return module.eval()

    return call
