"""What a step is judged on comes from the calibration split, and is not what it calibrates with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from omgoptim.errors import DataError
from omgoptim.models.data import DataSource
from omgoptim.models.raw_batch import RawBatch
from omgoptim.operations.optimization.selection_data import selection_as_evaluation


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
