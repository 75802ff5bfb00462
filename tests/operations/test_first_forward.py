"""First run of a model on its data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import DataError, ModelError
from omgoptim.measure.size import stored_precision
from omgoptim.models.data import from_callable
from omgoptim.models.samples import Samples
from omgoptim.operations.first_forward import (
    deterministic_outputs,
    float32_copy,
    float32_signature,
    is_causal,
    precision_of_module,
    refuse_fixed_casts,
    with_shifted_labels,
)
from omgoptim.operations.loaded_model import InMemoryModel, refuse_nan_samples, refuse_unlike_batches
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import InputTensor, Signature

INPUTS = (InputTensor("input", "float32", ("batch", 3), False),)


def samples_with_nan_in(number: int) -> Samples:
    rows = np.ones((6, 3), np.float32)
    rows[number, 1] = np.nan
    return Samples([{"input": rows[:4]}, {"input": rows[4:]}], [None, None])


class Imputing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.nan_to_num(input))


def test_nan_in_the_data_is_told_with_the_samples_number() -> None:
    with pytest.raises(DataError, match="sample 5 of the eval data holds NaN") as error:
        refuse_nan_samples(nn.Linear(3, 2), INPUTS, samples_with_nan_in(5), 60)
    assert "input 'input'" in error.value.why
    with pytest.raises(DataError, match="sample 2 of the train data holds NaN"):
        refuse_nan_samples(nn.Linear(3, 2), INPUTS, samples_with_nan_in(2), split="train")


def test_a_later_batch_of_a_size_that_the_model_does_not_take_is_the_datas_error() -> None:
    sizes = [np.ones((4, size), np.float32) for size in (3, 3, 2)]
    samples = Samples([{"input": rows} for rows in sizes], [None] * 3)
    with pytest.raises(DataError, match="does not run on batch 2 of the eval data") as error:
        refuse_unlike_batches(nn.Linear(3, 2), INPUTS, samples)
    assert "{'input': (2,)}, those of batch 0 {'input': (3,)}" in error.value.why
    refuse_unlike_batches(nn.ReLU(), INPUTS, samples)


def test_a_model_that_takes_missing_values_may_have_them() -> None:
    refuse_nan_samples(Imputing(3, 2), INPUTS, samples_with_nan_in(5), 60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_is_said_to_be_one_and_copied_to_float32(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    inputs = (InputTensor("input", name, ("batch", 3), False),)
    precision, notes = precision_of_module(module, inputs)
    assert precision == name
    assert name in notes[0]
    assert stored_precision(float32_copy(module))[0] == "float32"
    assert module[0].weight.dtype is dtype
    assert float32_signature(Signature(inputs, "tensor")).inputs == INPUTS


class Casting(nn.Linear):
    """A layer with bfloat16 weights that casts its input to the dtype `to`; None: to that of its weights."""

    def __init__(self, to: torch.dtype | None) -> None:
        super().__init__(3, 2, dtype=torch.bfloat16)
        self.to_dtype = to

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.to_dtype or self.weight.dtype)).float()


def test_a_forward_that_casts_to_a_fixed_dtype_is_refused_with_the_cast_that_follows_the_weights() -> None:
    batch, signature = {"input": np.ones((2, 3), np.float32)}, Signature(INPUTS, "tensor")
    refuse_fixed_casts(InMemoryModel(float32_copy(Casting(None)), None, None), signature, batch, "bfloat16")
    with pytest.raises(ModelError, match="float32 copy of the model, which is in bfloat16, does not run") as error:
        refuse_fixed_casts(
            InMemoryModel(float32_copy(Casting(torch.bfloat16)), None, None), signature, batch, "bfloat16"
        )
    assert "weight.dtype" in error.value.fix


def test_mixed_precision_is_the_one_of_most_bytes_and_said() -> None:
    module = nn.Sequential(nn.Embedding(50, 8).to(torch.bfloat16), nn.LayerNorm(8))
    precision, notes = precision_of_module(module, (InputTensor("input", "int64", ("batch", 4), False),))
    assert precision == "bfloat16"
    assert "mixed precision (93% bfloat16, 7% float32 by bytes)" in notes[0]
    assert precision_of_module(nn.Linear(3, 2), INPUTS) == ("float32", [])


class Next(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class OwnLoss(Next):
    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.table(ids)


def test_labels_of_a_causal_language_model_are_shifted_once_wherever_they_are_read() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    signature = Signature((InputTensor("ids", "int64", ("batch", 3), False),), "tensor")
    assert is_causal(Next(), signature, Samples([{"ids": ids.numpy()}], [ids.numpy()]), 60)
    data = from_callable(lambda split: [(ids, ids)], 2, 60)
    shifted = with_shifted_labels(data, Next())
    expected = [[2, 3, -100], [5, 6, -100]]
    assert next(shifted.batches("eval")).target.tolist() == expected
    assert next(shifted.epoch(2)).target.tolist() == expected
    by_the_model = with_shifted_labels(data, OwnLoss())
    assert next(by_the_model.batches("eval")).target.tolist() == expected
    assert next(by_the_model.epoch(2)).target.tolist() == ids.tolist()


class InPlace(nn.Module):
    """Writes into its input: a factor each time, or the same again."""

    def __init__(self, doubles: bool) -> None:
        super().__init__()
        self.doubles = doubles

    def forward(self, input: Tensor) -> Tensor:
        return (input.mul_(2) if self.doubles else input.clamp_(min=0)) + 1


def test_a_model_whose_next_call_sees_what_it_wrote_into_its_input_is_told_so() -> None:
    signature = Signature(INPUTS, "tensor")
    batch = {"input": np.array([[-1.0, 2.0, 3.0]], np.float32)}
    with pytest.raises(ModelError, match="changes its inputs in place") as error:
        deterministic_outputs(
            ENGINES["torch_eager"].open(InPlace(doubles=True), signature, SessionSettings(threads=1)), batch
        )
    assert "'input' has other values" in error.value.why
    same = ENGINES["torch_eager"].open(InPlace(doubles=False), signature, SessionSettings(threads=1))
    assert (deterministic_outputs(same, {"input": batch["input"].copy()})[0] >= 1).all()
