from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from small_training import blobs, net, signature_of, source
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from omgoptim.errors import DataError
from omgoptim.training.batches import Batches, as_target

X, Y = blobs(17)


def batches(train: Any) -> Batches:
    module = net()
    return Batches(source(train), module, signature_of(module, X[:2]))


def test_an_epoch_names_the_inputs_and_keeps_targets_beside_them() -> None:
    (batch,) = batches([(X[:4].double(), Y[:4].numpy())]).epoch(8)
    assert list(batch.inputs) == ["x"]
    assert batch.inputs["x"].dtype is torch.float32
    assert batch.target.tolist() == Y[:4].tolist()
    assert batch.size == 4


def test_a_last_batch_of_one_sample_is_left_out_but_where_all_are() -> None:
    assert [batch.size for batch in batches(TensorDataset(X, Y)).epoch(8)] == [8, 8]
    assert [batch.size for batch in batches(TensorDataset(X[:3], Y[:3])).epoch(1)] == [1, 1, 1]
    assert [batch.size for batch in batches([(X[:1], Y[:1]), (X[:2], Y[:2])]).epoch(8)] == [1, 2]


def test_a_survey_counts_once_and_shows_every_target() -> None:
    seen: list[Any] = []
    made = batches(TensorDataset(X, Y))
    count, first = made.survey(4, 0, seen.append)
    assert (count, first.size) == (4, 4)
    assert sum(len(target) for target in seen) == 16
    assert made.survey(4, 0, seen.append)[1] is first
    assert len(seen) == 4


def test_train_data_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omgoptim.training.batches.MAX_BATCHES", 50)
    with pytest.raises(DataError, match="the training data is endless"):
        batches(itertools.repeat((X[:4], Y[:4]))).survey(4, 0, lambda _target: None)


def test_train_data_that_is_empty_or_lacks_an_input_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        batches([]).survey(4, 0, lambda _target: None)

    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    module = Two()
    made = Batches(source([{"a": X, "target": Y}]), module, signature_of(module, {"a": X, "b": X}))
    with pytest.raises(DataError, match="lacks inputs") as error:
        next(made.epoch(4))
    assert "missing: b" in error.value.why


def test_targets_become_tensors_where_they_are_numbers() -> None:
    assert as_target([1, 2], 2).dtype is torch.int64
    assert as_target(np.array([1.0, 2.0]), 2).dtype is torch.float32
    assert as_target(torch.tensor([True, False]), 2).tolist() == [1, 0]
    assert as_target(np.int32(3), 1).tolist() == [3]
    assert as_target(None, 2) is None
    boxes = [{"boxes": 1}, {"boxes": 2}]
    assert as_target(boxes, 2) is boxes
    assert as_target(["a", "b"], 2) == ["a", "b"]
    with pytest.raises(DataError, match="target with 3 rows"):
        as_target([1, 2, 3], 2)
