from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from omgoptim.errors import DataError
from omgoptim.models.raw_batch import RawBatch
from omgoptim.models.samples import Samples, as_tensors, named_samples, repeat_to_size, synthetic_like

X = torch.arange(12.0).reshape(4, 3)


def made(target: Any = None, **inputs: torch.Tensor) -> Samples:
    named = [(name, tensor, True) for name, tensor in (inputs or {"x": X}).items()]
    return named_samples([named], [RawBatch(None, target)])


def test_samples_are_arrays_by_name_with_their_targets() -> None:
    samples = made([3, 1, 2, 0])
    assert_array_equal(samples.batches[0]["x"], X.numpy())
    assert samples.targets[0].tolist() == [3, 1, 2, 0]
    assert samples.count == 4
    assert made().targets == [None]


def test_an_array_of_samples_is_no_view_of_the_users_tensor() -> None:
    tensor = X.clone()
    samples = made(x=tensor)
    tensor.zero_()
    assert samples.batches[0]["x"].any()


def test_inputs_and_targets_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="different batch sizes"):
        made(a=X, b=X[:3])
    with pytest.raises(DataError, match="4 samples has a target with 3 rows"):
        made([1, 2, 3])


def test_splitting_keeps_every_sample_once_and_in_order() -> None:
    samples = Samples([{"x": np.arange(3)}, {"x": np.arange(3, 8)}], [np.arange(3), None])
    for first in (0, 2, 3, 5, 8, 20):
        head, tail = samples.split(first)
        assert head.count == min(first, 8)
        together = [*head.batches, *tail.batches]
        assert np.concatenate([batch["x"] for batch in together]).tolist() == list(range(8))
        assert len(head.targets) == len(head.batches)
    assert samples.split(5)[0].targets[1] is None


def test_a_batch_of_any_size_repeats_the_first_samples() -> None:
    samples = Samples([{"x": np.array([5, 6, 7])}], [None])
    assert repeat_to_size(samples, 2)["x"].tolist() == [5, 6]
    assert repeat_to_size(samples, 7)["x"].tolist() == [5, 6, 7, 5, 6, 7, 5]


def test_written_batches_read_back_in_order(tmp_path: Path) -> None:
    samples = Samples([{"x": np.full((1, 2), index)} for index in range(11)], [None] * 11)
    files = sorted(samples.write(tmp_path / "eval").iterdir())
    assert [int(np.load(file)["x"][0, 0]) for file in files] == list(range(11))


def test_synthetic_inputs_have_the_range_and_kind_of_real_ones_and_none_of_their_rows() -> None:
    random = np.random.default_rng(5)
    real = {
        "image": random.uniform(0, 1, (4, 20)).astype(np.float32),
        "ids": random.integers(100, 900, (4, 20)),
        "mask": np.array([[1] * 10 + [0] * 10] * 4),
        "flag": np.zeros((4, 1), bool),
        "half": random.normal(size=(4, 20)).astype(np.float16),
    }
    made = synthetic_like(real, seed=0)
    for name, array in made.items():
        assert (array.shape, array.dtype) == (real[name].shape, real[name].dtype), name
        assert array.min() >= real[name].min(), name
        assert array.max() <= real[name].max(), name
    assert not np.isin(made["image"], np.setdiff1d(real["image"], [real["image"].min(), real["image"].max()])).any()
    assert (made["ids"] != real["ids"]).mean() > 0.9
    assert made["mask"].all()
    assert_array_equal(made["flag"], real["flag"])
    assert all(np.array_equal(array, synthetic_like(real, seed=0)[name]) for name, array in made.items())


def test_synthetic_inputs_of_masks_with_infinity_are_finite_and_empty_ones_stay_empty() -> None:
    real = {"bias": np.array([[-np.inf, 0.0, 0.5]] * 2), "none": np.zeros((2, 0)), "ids": np.zeros((2, 0), np.int64)}
    made = synthetic_like(real, seed=0)
    assert np.isfinite(made["bias"]).all()
    assert made["bias"].min() >= 0.0
    assert made["none"].shape == made["ids"].shape == (2, 0)


def test_tensors_have_the_signatures_dtypes() -> None:
    made = as_tensors({"x": np.ones((1, 2), np.float32)}, {"x": "bfloat16"})
    assert made["x"].dtype == torch.bfloat16
