from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from omgoptim.blocks import BLOCKS, DepthSeparableConv
from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": "same"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_gives_what_a_convolution_with_its_dense_weight_gives(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = DepthSeparableConv(4, 6, **geometry, dtype=torch.float64)
    dense = nn.Conv2d(4, 6, **geometry, dtype=torch.float64)
    dense.weight, dense.bias = nn.Parameter(block.dense_weight()), block.bias
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), dense(x))


def test_it_slides_over_one_dimension_too() -> None:
    torch.manual_seed(0)
    dense = nn.Conv1d(4, 6, 5, stride=2, padding=2)
    block = DepthSeparableConv.like(dense)
    dense.weight, dense.bias = nn.Parameter(block.dense_weight()), block.bias
    x = torch.randn(2, 4, 11)
    torch.testing.assert_close(block(x), dense(x))


def test_64_to_128_channels_at_3x3_are_8768_weights_instead_of_73728() -> None:
    dense, block = nn.Conv2d(64, 128, 3, bias=False), DepthSeparableConv(64, 128, 3, bias=False)
    assert count_params(dense)[0] == 73_728
    assert count_params(block)[0] == 8_768
    assert count_params(DepthSeparableConv(64, 128, 3, norm=True))[0] == 8_768 + 128 + 2 * 64
    x = (torch.zeros(1, 64, 7, 7),)
    assert count_macs(block, x, {}).macs == 5 * 5 * 8_768
    assert count_macs(dense, x, {}).macs == 5 * 5 * 73_728


def test_it_begins_as_the_nearest_to_a_convolution_of_rank_one_for_each_input_channel() -> None:
    """The error is what the singular values behind the first of each channel's matrix hold (Eckart-Young)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, dtype=torch.float64)
    block = DepthSeparableConv.from_conv(conv)
    values = torch.linalg.svdvals(conv.weight.detach().transpose(0, 1).flatten(2))
    lost = (conv.weight - block.dense_weight()).square().sum()
    torch.testing.assert_close(lost, values[:, 1:].square().sum())
    assert block.bias is not None
    assert torch.equal(block.bias, conv.bias)


def test_a_convolution_that_is_depth_separable_is_taken_over_exactly() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(3, 5, 4, stride=2, bias=False).eval()
    conv.weight = nn.Parameter(torch.randn(5, 3, 1) * torch.randn(1, 3, 4), requires_grad=False)
    block = DepthSeparableConv.from_conv(conv)
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(block(x), conv(x))
    assert not block.training
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_an_activation_and_a_norm_stand_between_the_parts_where_they_are_asked_for() -> None:
    block = DepthSeparableConv(2, 2, 1, bias=False, norm=True, activation=True).eval()
    with torch.no_grad():
        block.depthwise.weight.fill_(-1.0)
        block.pointwise.weight.fill_(1.0)
        block.norm.running_mean = torch.tensor([-3.0, 0.0])
    x = torch.ones(1, 2, 1, 1)
    torch.testing.assert_close(block(x), torch.full((1, 2, 1, 1), 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [{"kernel_size": 3, "dims": 1}, {"kernel_size": (3, 5), "padding": "same", "norm": True, "bias": False}],
)
def test_its_configuration_builds_it_again(arguments: dict[str, Any]) -> None:
    block = DepthSeparableConv(3, 4, **arguments)
    assert BLOCKS["DepthSeparableConv"] is DepthSeparableConv
    again = DepthSeparableConv.from_config(json.loads(json.dumps(block.config())))
    again.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, *[8] * block.dims)
    assert torch.equal(again.eval()(x), block.eval()(x))


def test_what_has_no_such_form_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2"):
        DepthSeparableConv.from_conv(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="circular"):
        DepthSeparableConv.from_conv(nn.Conv2d(4, 4, 3, padding_mode="circular"))
    with pytest.raises(ValueError, match="not 3"):
        DepthSeparableConv(4, 4, 3, dims=3)
    with pytest.raises(ValueError, match="1 sizes are needed"):
        DepthSeparableConv(4, 4, (3, 3), dims=1)


@pytest.mark.parametrize("option", ["groups", "padding_mode", "strides"])
def test_an_option_that_a_block_does_not_have_is_refused(option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected options: {option}"):
        DepthSeparableConv(4, 4, 3, **{option: 2})  # type: ignore[arg-type]
