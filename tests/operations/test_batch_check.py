from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.prepare import prepare
from omgoptim.requests import PruneRequest, parse


class Switch(nn.Module):
    """One of two layers, by the mean of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.mean() > 0, self.one(x), self.other(x))


def load(split: str) -> Any:
    generator = torch.Generator().manual_seed(len(split))
    x = torch.randn(40, 4, generator=generator)
    return [(rows, torch.arange(len(rows)) % 3) for rows in x.split(16)]


def prepared(folder: Path, module: nn.Module) -> LoadedModel:
    request = parse("prune", {"model": "(live module)", "data": "(live data)", "threads": 1})
    assert isinstance(request, PruneRequest)
    context = RunContext(folder, "run", folder, sys.executable, "test", lambda _stage, _done: None)
    torch.manual_seed(0)
    return prepare(request, context, Live(module=module.eval(), data=load))


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (Switch(), "data-dependent control flow"),
        (
            nn.Sequential(
                nn.Unflatten(1, (1, 4)), nn.BatchNorm1d(1, track_running_stats=False), nn.Flatten(), nn.Linear(4, 3)
            ),
            "batch normalization without running statistics (1)",
        ),
    ],
)
def test_a_model_whose_answer_depends_on_the_batch_is_judged_sample_by_sample(
    module: nn.Module, cause: str, tmp_path: Path
) -> None:
    loaded = prepared(tmp_path, module)
    assert loaded.batch_dependent is not None
    assert cause in loaded.batch_dependent
    assert any("quality is measured at batch 1" in note for note in loaded.notes)
    assert [len(batch["input" if "input" in batch else "x"]) for batch in loaded.evaluation.batches] == [1] * 40
    assert len(loaded.samples("calibration", 40).batches) == 40
    assert len(loaded.samples("train", 40).batches) == 3  # statistics are read in batches
    assert len(list(loaded.eval_folder.iterdir())) == 40
    assert (set(loaded.bench.batches), loaded.bench.batch) == ({"latency"}, 1)
    assert any("throughput is not measured" in note for note in loaded.notes)


def test_an_ordinary_model_keeps_its_batches(tmp_path: Path) -> None:
    loaded = prepared(tmp_path, nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    assert loaded.batch_dependent is None
    assert len(loaded.evaluation.batches) == 3
    assert set(loaded.bench.batches) == {"latency", "throughput"}
