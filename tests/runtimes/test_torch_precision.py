from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from omgoptim.runtimes.torch_precision import convert, converted_layers, load_state, state_of


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(3, 4), nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x[:, 0])[0])


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.free = nn.LayerNorm(3), nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(torch.relu(self.fc(self.norm(x))))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "head": Head,
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "cells": Cells,
}
X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3))


def built(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODULES[name]().eval()


def leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    assert isinstance(value, tuple)
    return [leaf for item in value for leaf in leaves(item)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "int8_dynamic"])
@pytest.mark.parametrize("name", MODULES)
def test_a_saved_state_put_into_a_new_module_gives_the_same_bits(name: str, precision: str) -> None:
    saved, fresh = (convert(built(name, seed), precision) for seed in (1, 2))
    state = state_of(saved)
    assert all(isinstance(value, Tensor) and not value.is_quantized for value in state.values())
    x = X.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32))
    with torch.inference_mode():
        expected = leaves(saved(x))
        assert not all(torch.equal(a, b) for a, b in zip(expected, leaves(fresh(x)), strict=True))
        load_state(fresh, state)
        assert all(torch.equal(a, b) for a, b in zip(expected, leaves(fresh(x)), strict=True))


def test_int8_layers_are_listed_by_path_and_their_weights_are_int8() -> None:
    module = convert(built("head", 1), "int8_dynamic")
    assert converted_layers(module) == [("fc", "Linear"), ("free", "Linear")]
    state = state_of(module)
    assert state["fc.weight.int8"].dtype == torch.int8
    assert state["fc.weight.scale"].shape == (4,)
    assert state["norm.weight"].dtype == torch.float32
    assert "free.bias" not in state
    assert converted_layers(built("head", 1)) == []


def test_int8_weights_are_within_half_a_step_of_the_float_ones() -> None:
    module = built("head", 1)
    weight = module.fc.weight.detach().clone()  # type: ignore[union-attr, operator]
    state = state_of(convert(module, "int8_dynamic"))
    scale = state["fc.weight.scale"][:, None]
    restored = (state["fc.weight.int8"].float() - state["fc.weight.zero_point"][:, None]) * scale
    assert ((restored - weight).abs() <= scale / 2 + 1e-7).all()


def test_a_module_of_another_architecture_is_refused_by_keys_or_by_shapes() -> None:
    state = state_of(built("head", 1))
    with pytest.raises(KeyError, match=r"missing \['bias', 'weight'\]"):
        load_state(built("linear", 1), state)
    with pytest.raises(RuntimeError, match=r"bias has shape \(1,\), the module's has \(2,\)"):
        load_state(built("linear", 1), {"weight": torch.zeros(2, 3), "bias": torch.zeros(1)})


def test_a_state_keeps_its_own_dtype_whatever_the_module_was_in() -> None:
    module = built("linear", 1)
    state = {name: value.clone() for name, value in state_of(module).items()}
    other = copy.deepcopy(module).to(torch.bfloat16)
    load_state(other, state)
    assert torch.equal(other.weight, state["weight"])  # type: ignore[arg-type]
    assert other.weight.dtype == torch.float32


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.weight

    module, fresh = Tied(), convert(Tied(), "bfloat16")
    load_state(fresh, state_of(convert(module, "bfloat16")))
    assert fresh.out.weight is fresh.table.weight
    assert torch.equal(fresh.table.weight, module.table.weight)  # type: ignore[arg-type, union-attr]
