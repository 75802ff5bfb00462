"""Runs of techniques on modules, from a module and its inputs alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.samples import Samples
from omgoptim.requests.factorize import Factorization
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.registry import ModuleRun, Outcome, apply_to_module

RunOf = Callable[..., ModuleRun]
Factorized = Callable[[nn.Module, Factorization, ModuleRun], tuple[nn.Module, Outcome]]


def no_loss(_outputs: Any, _target: Any) -> Tensor:
    raise AssertionError("factorization reads no targets")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_of(tmp_path: Path) -> RunOf:
    """`run_of(module, x=…, attention_mask=…)`: a run whose statistics are these inputs, passed by name."""

    def make(module: nn.Module, runtime: str = "torch_eager", **inputs: Tensor) -> ModuleRun:
        arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
        described = tuple(
            InputTensor(name, str(tensor.dtype).removeprefix("torch."), ("batch", *tensor.shape[1:]), True)
            for name, tensor in inputs.items()
        )
        samples = Samples([arrays], [None])
        return ModuleRun(Signature(described, "tensor"), samples, no_loss, module, tmp_path, runtime=runtime)

    return make


@pytest.fixture
def factorized() -> Factorized:
    """A copy of the module after the technique of its params, and the outcome."""

    def apply(module: nn.Module, params: Factorization, run: ModuleRun) -> tuple[nn.Module, Outcome]:
        copied = copy.deepcopy(module)
        return copied, apply_to_module(copied, params, run)

    return apply


@pytest.fixture
def correlated() -> Callable[..., Tensor]:
    """`correlated(rows, features)`: inputs with directions of very different size, and a mean that is not zero."""

    def draw(rows: int, features: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.logspace(0.5, -2, features)[:, None]
        mixing = sizes * torch.randn(features, features, generator=generator)
        return torch.randn(rows, features, generator=generator) @ mixing + torch.randn(features, generator=generator)

    return draw
