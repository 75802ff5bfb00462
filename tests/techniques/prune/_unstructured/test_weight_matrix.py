"""Weights as rows: one per output, and what is in it, against what the layers compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omgoptim.techniques.prune._unstructured.parameter_selection import channels_in, from_rows, to_rows

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
