"""Selection of weights with the reasons for the others, and weights as rows of outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from omgoptim.errors import TechniqueError
from omgoptim.techniques.prune._unstructured.parameter_selection import (
    EMBEDDING_REASON,
    FROZEN_REASON,
    Selection,
    channels_in,
    from_rows,
    select,
    to_rows,
)

LAYERS = [
    nn.Linear(6, 4),
    nn.Conv1d(6, 4, 3),
    nn.Conv2d(6, 4, (3, 2)),
    nn.Conv2d(6, 4, 3, groups=2),
    nn.Conv2d(6, 6, 3, groups=6),
    nn.Conv3d(2, 4, 2),
    nn.ConvTranspose1d(6, 4, 3),
    nn.ConvTranspose2d(6, 4, 3, groups=2),
    nn.ConvTranspose3d(2, 4, 2),
]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 8, 3))
        self.norm, self.affine = nn.LayerNorm([4, 8]), nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.rnn = nn.LSTM(8, 4, num_layers=2, bidirectional=True, proj_size=2)
        self.cell = nn.GRUCell(8, 4)
        self.head = nn.Linear(8, 3)
        self.position = nn.Parameter(torch.zeros(5, 8))


def paths(selection: Selection) -> list[str]:
    return [weight.path for weight in selection.weights]


def reasons(selection: Selection) -> dict[str, str]:
    return {skip.path: skip.reason for skip in selection.skipped}


def test_the_weights_of_known_layers_are_found_and_neither_biases_nor_norms() -> None:
    found = paths(select(Mixed(), [], []))
    expected = {"conv.0", "conv.2", "head", "cell.weight_ih", "cell.weight_hh"}
    expected |= {"attention.in_proj_weight", "attention.out_proj", "cross.out_proj"}
    expected |= {f"cross.{name}_proj_weight" for name in "qkv"}
    expected |= {
        f"rnn.weight_{kind}_l{layer}{way}"
        for kind in ("ih", "hh", "hr")
        for layer in (0, 1)
        for way in ("", "_reverse")
    }
    assert set(found) == expected
    assert len(found) == len(expected)


def test_parameters_that_are_no_weights_are_skipped_with_the_reason() -> None:
    told = reasons(select(Mixed(), [], []))
    assert told == {"embed": EMBEDDING_REASON, "position": "Mixed is not a supported layer type"}


def test_globs_mean_layers_and_everything_under_a_module() -> None:
    module = Mixed()
    assert paths(select(module, ["conv"], [])) == ["conv.0", "conv.2"]
    assert paths(select(module, ["conv", "head"], ["*.0"])) == ["conv.2", "head"]
    assert paths(select(module, ["rnn.weight_hh*"], ["*reverse"])) == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    assert "attention.in_proj_weight" not in paths(select(module, [], ["attention"]))


def test_an_embedding_is_chosen_by_its_name_alone() -> None:
    module = Mixed()
    assert paths(select(module, ["embed"], [])) == ["embed"]
    assert paths(select(module, ["em*"], [])) == ["embed"]
    assert "embed" not in paths(select(module, ["*"], []))
    assert "embed" not in paths(select(nn.Sequential(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))), ["0"], []))


def test_a_glob_that_names_nothing_is_refused_with_what_was_meant() -> None:
    for targets, ignore in ((["haed"], []), ([], ["haed"])):
        with pytest.raises(TechniqueError, match="'haed' matches no layer") as error:
            select(Mixed(), targets, ignore)
        assert "'head'" in error.value.why


def test_a_glob_may_name_a_layer_that_cannot_be_pruned_and_gets_the_reason() -> None:
    with pytest.raises(TechniqueError, match="no weight to prune") as error:
        select(Mixed(), ["position"], [])
    assert "not a supported layer type" in error.value.why
    assert "select other layers" in error.value.fix


def test_frozen_integer_and_broken_weights_are_skipped() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    net[0].weight.requires_grad = False
    net[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    net[2].weight.data[0, 0] = float("nan")
    selection = select(net, [], [])
    assert paths(selection) == ["3"]
    assert reasons(selection) == {
        "0": FROZEN_REASON,
        "1": "its weight is int8, not float",
        "2": "its weight contains NaN or infinity",
    }


def test_a_weight_that_is_computed_from_others_is_skipped() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    selection = select(net, [], [])
    assert paths(selection) == ["1"]
    assert "remove the parametrization first" in reasons(selection)["0"]


class Tied(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(4, 6), other
        self.other.weight = self.first.weight


def test_a_shared_weight_is_found_once_with_both_paths() -> None:
    selection = select(Tied(nn.Linear(4, 6)), [], [])
    assert [weight.paths for weight in selection.weights] == [["first", "other"]]
    assert selection.count == 24
    assert paths(select(Tied(nn.Linear(4, 6)), ["other"], [])) == ["first"]
    with pytest.raises(TechniqueError, match="no weight to prune"):
        select(Tied(nn.Linear(4, 6)), [], ["other"])


def test_a_head_that_shares_its_weight_with_an_embedding_is_chosen_by_the_embeddings_name_alone() -> None:
    net = nn.Sequential(Tied(nn.Embedding(6, 4)), nn.Linear(4, 4))
    selection = select(net, [], [])
    assert paths(selection) == ["1"]
    assert reasons(selection) == {"0.first": f"it shares its weight with 0.other; {EMBEDDING_REASON}"}
    assert paths(select(net, ["0.other"], [])) == ["0.first"]


def test_a_layer_used_under_two_names_is_one_weight() -> None:
    layer = nn.Linear(2, 2)
    assert [weight.paths for weight in select(nn.Sequential(layer, nn.ReLU(), layer), [], []).weights] == [["0", "2"]]


def test_a_model_that_is_one_layer_has_its_weight_by_name() -> None:
    assert paths(select(nn.Linear(2, 2), [], [])) == ["weight"]
    assert paths(select(nn.Linear(2, 2), ["*"], [])) == ["weight"]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(TechniqueError, match="no weight to prune") as error:
        select(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), [], [])
    assert "no Linear, convolution or recurrent layer" in error.value.why


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_row_is_what_one_output_reads(layer: nn.Module) -> None:
    weight = layer.weight
    rows = to_rows(weight, layer)
    assert len(rows) == len(layer.bias)
    rows[1].sum().backward()
    used = weight.grad != 0  # which weights are in row 1
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    x = torch.rand(1, channels, *[5] * (weight.ndim - 2))
    with torch.no_grad():
        weight.copy_(used.float())
        layer.bias.zero_()
        given = layer(x)
    weight.grad = None
    outputs = given.flatten(2).abs().sum((0, 2)) if given.ndim > 2 else given.abs().sum(0)
    assert (outputs > 0).tolist() == [index == 1 for index in range(len(outputs))]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_become_the_weight_again(layer: nn.Module) -> None:
    weight = torch.arange(layer.weight.numel(), dtype=torch.float32).reshape(layer.weight.shape)
    assert torch.equal(from_rows(to_rows(weight, layer), layer, tuple(weight.shape)), weight)


def test_neighbours_in_a_row_are_input_channels_at_one_position() -> None:
    conv = nn.Conv2d(4, 2, 3)
    weight = torch.arange(72.0).reshape(2, 4, 3, 3)
    assert to_rows(weight, conv)[0, :4].tolist() == weight[0, :, 0, 0].tolist()
    assert to_rows(weight, conv)[0, 4:8].tolist() == weight[0, :, 0, 1].tolist()
    deconv = nn.ConvTranspose2d(4, 2, 3)
    weight = torch.arange(72.0).reshape(4, 2, 3, 3)
    assert to_rows(weight, deconv)[1, 4:8].tolist() == weight[:, 1, 0, 1].tolist()


def test_the_runs_of_input_channels_are_those_of_a_group() -> None:
    assert channels_in(nn.Linear(6, 4), (4, 6)) == 6
    assert channels_in(nn.Conv2d(8, 4, 3, groups=2), (4, 4, 3, 3)) == 4
    assert channels_in(nn.ConvTranspose2d(8, 4, 3, groups=2), (8, 2, 3, 3)) == 4


def test_a_transposed_linear_of_transformers_is_turned() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(4, 6)  # 6 inputs, 4 outputs
    assert to_rows(layer.weight, layer).shape == (4, 6)
    assert torch.equal(from_rows(to_rows(layer.weight, layer), layer, (6, 4)), layer.weight)
    assert channels_in(layer, (6, 4)) == 6
