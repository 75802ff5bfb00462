"""Selection samples of a step come from the calibration split, and are not those that it calibrates with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from omgoptim.errors import DataError, UserCodeError
from omgoptim.models.data import DataSource
from omgoptim.models.raw_batch import RawBatch
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import load_datasets
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.optimization.selection_data import data_identity, selection_as_evaluation, training_problem
from omgoptim.operations.prepare import prepare
from omgoptim.requests import PruneRequest


def numbered(samples: int, batch: int = 24) -> DataSource:
    """Sample i of a split is the number i (+ 10,000 in train, + 20,000 in eval)."""
    offset = {"calibration": 0, "train": 10_000, "eval": 20_000}

    def batches(split: str) -> Iterator[RawBatch]:
        values = torch.arange(samples) + offset[split]
        for rows in values.split(batch):
            yield RawBatch(rows[:, None].float(), rows)

    return DataSource(batches, lambda _: batches("train"), True)


def values(data: DataSource, split: str) -> list[int]:
    return [int(value) for raw in data.batches(split) for value in raw.target]  # type: ignore[arg-type]


def test_the_calibration_split_is_divided_and_no_evaluation_sample_is_left() -> None:
    data = selection_as_evaluation(numbered(101))
    assert values(data, "calibration") == list(range(51))
    assert values(data, "eval") == list(range(51, 101))
    assert values(data, "train") == values(numbered(101), "train")


def test_inputs_and_targets_stay_together_across_batches() -> None:
    for raw in selection_as_evaluation(numbered(100, batch=7)).batches("eval"):
        assert raw.inputs[:, 0].tolist() == raw.target.tolist()


def test_too_few_samples_are_refused_before_any_step() -> None:
    with pytest.raises(DataError) as refused:
        selection_as_evaluation(numbered(20))
    assert "32" in refused.value.fix


def test_a_training_sample_that_steps_are_judged_on_is_left_out() -> None:
    same = numbered(100)
    data = selection_as_evaluation(
        DataSource(lambda _: same.batches("calibration"), lambda _: same.batches("train"), True)
    )
    assert values(data, "train") == list(range(50))
    assert values(data, "eval") == list(range(50, 100))


def test_a_loader_that_shuffles_gives_the_same_halves_every_time() -> None:
    def batches(_: str) -> Iterator[RawBatch]:
        for rows in torch.randperm(100).split(16):
            yield RawBatch(rows[:, None].float(), rows)

    data = selection_as_evaluation(DataSource(batches, lambda _: batches("train"), True))  # type: ignore[arg-type]
    calibration, selection = values(data, "calibration"), values(data, "eval")
    assert selection == values(data, "eval")
    assert sorted(calibration + selection) == list(range(100))
    assert sorted(values(data, "train")) == sorted(calibration)


def test_data_is_told_apart_by_what_is_in_it() -> None:
    assert data_identity(numbered(40)) == data_identity(numbered(40)) != data_identity(numbered(41))


def test_without_a_train_split_the_reason_is_said() -> None:
    def batches(split: str) -> Iterator[RawBatch]:
        if split == "train":
            raise DataError("no such split", "load knows calibration and eval")
        return numbered(100).batches("calibration")

    data = selection_as_evaluation(DataSource(batches, lambda _: batches("train"), True))  # type: ignore[arg-type]
    assert training_problem(data) == "the train split cannot be read: load knows calibration and eval"
    assert training_problem(selection_as_evaluation(numbered(100))) is None


def test_what_a_step_is_prepared_with_never_loads_the_evaluation_split(tmp_path: Path) -> None:
    def load(split: str) -> TensorDataset:
        if split == "eval":
            raise RuntimeError("a step read the evaluation data")
        rows = torch.arange(100 if split == "calibration" else 64).float()[:, None] + (1000 if split == "train" else 0)
        return TensorDataset(rows, (rows[:, 0] > 50).long())

    module = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    request = PruneRequest(model="(live module)", data="(live data)", samples=40, timing="quick", threads=1)
    context = RunContext(tmp_path, "prune-1", tmp_path, "python", "a test", lambda *_: None)
    live = Live(module=module, data=load, resplit=selection_as_evaluation)
    loaded = prepare(request, context, live)
    (name,) = loaded.signature.input_names
    seen = [int(value.item()) for batch in loaded.evaluation.batches for value in batch[name]]
    assert seen == list(range(50, 90))
    datasets = load_datasets(request, loaded, module, live)
    assert sum(len(next(iter(batch.values()))) for batch in datasets.selection.batches) == 50
    with pytest.raises(UserCodeError, match="a step read the evaluation data"):
        prepare(request, context, replace(live, resplit=None))
