"""A run of a technique on a module, as an operation would give it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.forward import first_forward, input_tensors, name_inputs, to_numpy
from omgoptim.models.samples import Samples
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]


@pytest.fixture
def run_of(tmp_path: Path) -> RunOf:
    """`run_of(module, batches, targets=(), loss=..., seed=0)`: batches are what the module is called with."""

    def call(
        module: nn.Module,
        batches: Sequence[Any],
        targets: Sequence[Any] = (),
        loss: Callable[[Any, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> ModuleRun:
        named = [name_inputs(module, batch) for batch in batches]
        module.eval()
        signature = first_forward(module, input_tensors(named), {name: tensor for name, tensor, _ in named[0]})
        arrays = [{name: to_numpy(tensor) for name, tensor, _ in batch} for batch in named]
        samples = Samples(arrays, list(targets) or [None] * len(arrays))
        return ModuleRun(
            signature=signature,
            statistics=samples,
            loss=loss or (lambda outputs, _: 0.5 * outputs.square().mean()),
            original=copy.deepcopy(module),
            scratch=tmp_path,
            seed=seed,
        )

    return call


@pytest.fixture
def drawn() -> Callable[..., Tensor]:
    """`drawn(*shape, seed=0)`: a normal tensor that is the same each time."""

    def call(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return call
