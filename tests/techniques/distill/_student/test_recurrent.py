from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.distill._student.recurrent import find_recurrent, narrow_units
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
ALL = LayerSelection([], [])
WAYS = ("last", "hidden", "attention", "mean", "stack", "packed", "both")


class Sequence(nn.Module):
    """A recurrent layer, read in one of the ways that people read them."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, how: str = "last", bidirectional: bool = False) -> None:
        super().__init__()
        self.how, wide = how, 12 if bidirectional else 6
        self.rnn = kind(5, 6, 2, batch_first=True, bidirectional=bidirectional)
        self.weigh, self.norm = nn.Linear(wide, 1), nn.LayerNorm(wide)
        self.second = nn.GRU(wide, 4, batch_first=True)
        self.out = nn.Linear({"stack": 4, "both": 2 * wide}.get(how, wide), 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "packed":
            packed = pack_padded_sequence(x, torch.tensor([7] * (len(x) - 1) + [4]), batch_first=True)
            y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.out(y.sum(1) * 0 + y[:, 0])
        y, state = self.rnn(x)
        hidden = state[0] if isinstance(state, tuple) else state
        if self.how == "hidden":
            last = hidden[-1] if not self.rnn.bidirectional else torch.cat([hidden[-2], hidden[-1]], 1)
            return self.out(last)
        if self.how == "attention":
            return self.out((torch.softmax(self.weigh(y), 1) * y).sum(1))
        if self.how == "mean":
            return self.out(torch.relu(y).mean(1))
        if self.how == "stack":
            return self.out(self.second(y)[0][:, -1])
        if self.how == "both":
            return self.out(torch.cat([y[:, -1], y.amax(1)], 1))
        return self.out(self.norm(y[:, -1]) if self.how == "norm" else y[:, -1])


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def silent(module: nn.Module, kept: Tensor) -> nn.Module:
    """By hand: the units of the one-layer, one-way LSTM that do not stay are read by nobody."""
    twin = copy.deepcopy(module)
    gone = [unit for unit in range(6) if unit not in kept.tolist()]
    with torch.no_grad():
        twin.rnn.weight_hh_l0[:, gone] = 0.0
        twin.out.weight[:, gone] = 0.0
    return twin


class Plain(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(5, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_without_some_units_a_layer_gives_what_it_gives_when_nobody_reads_them(
    kind: type[nn.RNNBase], run_of: RunOf, drawn: Any
) -> None:
    module, x = built(lambda: Plain(kind)), drawn(3, 7, 5)
    (found,), skipped = find_recurrent(module, ALL, run_of(module, x))
    assert skipped == []
    (reader,) = found.readers
    assert (reader.path, reader.columns.tolist(), reader.units.tolist()) == ("out", [*range(6)], [*range(6)])
    kept = found.best(4)[0]
    expected = silent(module, kept)(x)
    changes, left = narrow_units(module, [(found, 4)])
    torch.testing.assert_close(module(x), expected)
    assert torch.equal(left["out"], kept)
    assert [(change.path, change.before, change.after) for change in changes] == [("rnn", "6", "4"), ("out", "6", "4")]
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    assert module.rnn.weight_ih_l0.shape == (gates * 4, 5)
    assert module.rnn.weight_hh_l0.shape == (gates * 4, 4)


def test_the_units_with_the_largest_weights_stay(run_of: RunOf, drawn: Any) -> None:
    module = built(Plain)
    with torch.no_grad():
        module.rnn.weight_ih_l0[[2, 8, 14, 20]] *= 10  # unit 2 in each of the four gates
        module.out.weight[:, 4] *= 50
    (found,), _ = find_recurrent(module, ALL, run_of(module, drawn(3, 7, 5)))
    assert found.best(2).tolist() == [[2, 4]]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_whoever_reads_the_units_is_found_and_the_narrower_model_runs(
    kind: type[nn.RNNBase], bidirectional: bool, how: str, run_of: RunOf, drawn: Any, reopened: Any
) -> None:
    """Every layer found was proven, on a copy, to give what it gives when the units that go are ignored."""
    module, x = built(lambda: Sequence(kind, how, bidirectional)), drawn(3, 7, 5)
    found, skipped = find_recurrent(module, ALL, run_of(module, x))
    assert skipped == []
    assert [each.path for each in found] == ["rnn", "second"]
    teacher = copy.deepcopy(module)
    narrow_units(module, [(each, 3) for each in found])
    assert module.rnn.hidden_size == module.second.hidden_size == 3
    assert module(x).shape == (3, 3)
    assert torch.equal(reopened(teacher, module)(x), module(x))


def test_a_layer_whose_units_a_normalization_mixes_is_left_with_the_reason(run_of: RunOf, drawn: Any) -> None:
    module = built(lambda: Sequence(how="norm"))
    found, (skip,) = find_recurrent(module, ALL, run_of(module, drawn(3, 7, 5)))
    assert "rnn" not in [each.path for each in found]
    assert (skip.path, "does not run" in skip.reason) == ("rnn", True)


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Squared(Plain):
    """A product of the units with themselves, that no layer reads."""

    def forward(self, x: Tensor) -> Tensor:
        last = self.rnn(x)[0][:, -1]
        return self.out(last) + last.square().sum(1, keepdim=True)


def test_units_that_are_the_outputs_or_reach_them_past_every_layer_stay(run_of: RunOf, drawn: Any) -> None:
    for make, said in ((Outputs, "outputs of the model"), (Squared, "mixes its hidden units")):
        module = built(make)
        found, (skip,) = find_recurrent(module, ALL, run_of(module, drawn(3, 7, 5)))
        assert found == []
        assert said in skip.reason


class Begun(nn.Module):
    """The model itself makes the first state, from the number that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.layers = 6, 6
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x, torch.zeros(1, len(x), self.hidden_size))[0][:, -1])


def test_what_the_model_itself_knows_as_the_width_follows(run_of: RunOf, drawn: Any) -> None:
    module, x = built(Begun), drawn(3, 7, 5)
    (found,), _ = find_recurrent(module, ALL, run_of(module, x))
    narrow_units(module, [(found, 2)])
    assert (module.hidden_size, module.layers) == (2, 6)
    assert module(x).shape == (3, 3)


def test_a_feature_that_is_a_whole_number_is_not_taken_for_a_unit(run_of: RunOf, drawn: Any) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 6, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            marks = torch.tensor([[1.0, 5.0]]).expand(len(x), -1)
            return self.out(torch.cat([marks, self.rnn(x)[0][:, -1]], 1))

    module = built(Beside)
    (found,), _ = find_recurrent(module, ALL, run_of(module, drawn(3, 7, 5)))
    assert found.readers[0].columns.tolist() == [2, 3, 4, 5, 6, 7]


def projected() -> nn.Module:
    module = Plain()
    module.rnn = nn.LSTM(5, 8, proj_size=6, batch_first=True)
    return module


def frozen() -> nn.Module:
    module = Plain()
    module.rnn.weight_hh_l0.requires_grad_(False)
    return module


def tied() -> nn.Module:
    module = Plain(nn.GRU)
    module.twin = nn.Linear(6, 3)
    module.twin.weight = module.out.weight
    return module


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("make", "said"),
    [(projected, "proj_size"), (frozen, "is frozen"), (tied, "out.weight, which reads its output, is shared")],
)
def test_layers_that_cannot_shrink_are_skipped_with_the_reason(
    make: Callable[[], nn.Module], said: str, run_of: RunOf, drawn: Any
) -> None:
    module = built(make)
    found, (skip,) = find_recurrent(module, ALL, run_of(module, drawn(3, 7, 5)))
    assert found == []
    assert said in skip.reason


def test_layers_that_are_not_asked_for_are_left(run_of: RunOf, drawn: Any) -> None:
    module = built(Plain)
    found, (skip,) = find_recurrent(module, LayerSelection([], ["rnn"]), run_of(module, drawn(3, 7, 5)))
    assert found == []
    assert "ignore" in skip.reason
