from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import DataError, ModelError
from omgoptim.models.forward import as_tensor, first_forward, input_tensors, name_inputs, to_numpy
from omgoptim.runtimes.signature import InputTensor, Signature

X, IDS = torch.zeros(2, 3), torch.zeros(2, 5, dtype=torch.int64)


class Takes(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        return ids * 2


def names(module: nn.Module | None, raw: Any, known: tuple[str, ...] = ()) -> list[tuple[str, bool]]:
    return [(name, keyword) for name, _, keyword in name_inputs(module, raw, known)]


def test_a_tensor_is_the_first_argument_and_a_tuple_goes_by_position() -> None:
    assert names(Takes(), IDS) == [("ids", False)]
    assert names(Takes(), (IDS, IDS)) == [("ids", False), ("mask", False)]


def test_a_dict_goes_by_name_in_the_order_of_the_forward_whatever_its_own() -> None:
    raw = {"scale": X, "mask": IDS, "extra": X, "ids": IDS, "none": None}
    assert names(Takes(), raw) == [("ids", True), ("mask", True), ("scale", True)]
    assert names(None, {"b": X, "a": X, "c": X}, ("a", "b")) == [("a", True), ("b", True)]


def test_a_forward_that_takes_anything_gets_everything() -> None:
    class Any_(nn.Module):
        def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
            return X

    assert names(Any_(), (X, X)) == [("parts_0", False), ("parts_1", False)]
    assert names(Any_(), {"z": X, "a": X}) == [("z", True), ("a", True)]


def test_a_program_is_given_its_own_names() -> None:
    assert names(None, X, ("image",)) == [("image", False)]


def test_inputs_that_the_model_does_not_take_are_an_error_that_lists_both_sides() -> None:
    with pytest.raises(DataError, match="no key of the data's batches") as error:
        name_inputs(Takes(), {"input_ids": IDS})
    assert error.value.why == "the batches have input_ids; the model takes ids, mask, scale"
    with pytest.raises(DataError, match="have 3 inputs, and the model takes 2"):
        name_inputs(Takes(), (X, X, X))


def test_arrays_and_lists_become_tensors_and_objects_do_not() -> None:
    assert as_tensor([[1, 2]], "x").tolist() == [[1, 2]]
    assert as_tensor(np.ones((1, 2), np.float32), "x").dtype == torch.float32
    with pytest.raises(DataError, match="input 'x' is a dict"):
        as_tensor({}, "x")
    assert to_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).dtype == np.float32


def named(*shapes: tuple[int, ...]) -> list[list[tuple[str, Tensor, bool]]]:
    return [[("x", torch.zeros(shape), False)] for shape in shapes]


def test_the_batch_is_free_and_so_is_a_dimension_that_differs_between_batches() -> None:
    assert input_tensors(named((2, 3, 4))) == (InputTensor("x", "float32", ("batch", 3, 4), False),)
    assert input_tensors(named((2, 3, 4), (1, 3, 7)))[0].shape == ("batch", 3, "x_2")


def test_batches_that_differ_in_kind_are_refused() -> None:
    with pytest.raises(DataError, match="scalar"):
        input_tensors(named(()))
    with pytest.raises(DataError, match="input 'x' differ between batches") as error:
        input_tensors(named((2, 3), (3,)))
    assert error.value.why == "torch.float32 with 1 dimensions and torch.float32 with 2 dimensions"
    with pytest.raises(DataError, match="differ between batches"):
        input_tensors([[("x", X, False)], [("x", X.double(), False)]])
    with pytest.raises(DataError, match="have different inputs") as error:
        input_tensors([[("x", X, True), ("mask", X, True)], [("x", X, True)]])
    assert error.value.why == "one has x, mask; another x"


def run(module: nn.Module, *tensors: Tensor) -> Signature:
    raw = name_inputs(module, tensors)
    return first_forward(module.eval(), input_tensors([raw]), {name: tensor for name, tensor, _ in raw})


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "structure"),
    [
        (X, "tensor"),
        ((X, (X, [X])), {"tuple": ["tensor", {"tuple": ["tensor", {"list": ["tensor"]}]}]}),
        ({"logits": X, "cache": None}, {"dict": {"logits": "tensor", "cache": None}}),
    ],
)
def test_one_forward_learns_the_structure_of_the_outputs(value: Any, structure: Any) -> None:
    assert run(Returns(value), X).outputs == structure


def test_the_nested_output_of_an_lstm_is_learnt() -> None:
    assert run(nn.LSTM(3, 4, batch_first=True), torch.zeros(2, 5, 3)).output_names == ["output_0", "1_0", "1_1"]


@pytest.mark.parametrize(
    ("value", "said"),
    [("text", "cannot be measured"), ((X, 3), "cannot be measured"), (None, "no tensor"), ((), "no tensor")],
)
def test_outputs_that_are_no_tensors_are_refused(value: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        run(Returns(value), X)
    assert error.value.fix


def test_shapes_that_do_not_fit_name_the_innermost_layer_and_the_inputs() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), nn.ReLU())
    with pytest.raises(ModelError, match=r"layer '0\.1' failed") as error:
        run(module, X)
    assert "shapes cannot be multiplied" in error.value.why
    assert error.value.why.endswith("inputs: input float32(2, 3)")
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in module.modules())


def test_a_failure_of_the_models_own_forward_is_reported_as_one() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.ones(3)

    with pytest.raises(ModelError, match="its forward method failed"):
        run(Own(), X)


def test_the_kind_of_an_error_in_the_forward_is_told_before_its_first_words() -> None:
    class Keyed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return {"a": x}["logits"]

    with pytest.raises(ModelError) as error:
        run(Keyed(), X)
    assert error.value.why.startswith("KeyError: 'logits'; inputs: ")


def test_nan_in_an_output_is_a_failure_and_infinity_is_not() -> None:
    with pytest.raises(ModelError, match="outputs contain NaN") as error:
        run(Returns((X, torch.tensor([1.0, float("nan")]))), X)
    assert error.value.why.startswith("1 of 2 values")
    assert run(Returns(torch.tensor([float("-inf")])), X).outputs == "tensor"
