from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from omgoptim.blocks import BLOCKS, LowRankLinear, SpatialConv2d, Tucker2Conv2d
from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": (2, 1)},
    {"kernel_size": (3, 4), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 1, "stride": 2},
]


def conv_blocks(**geometry: Any) -> list[SpatialConv2d | Tucker2Conv2d]:
    spatial = SpatialConv2d(4, 6, rank=3, **geometry)
    return [spatial, Tucker2Conv2d(4, 6, rank_in=2, rank_out=3, **geometry)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_factorized_convolution_gives_what_one_with_its_dense_weight_gives(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for block in conv_blocks(**geometry, dtype=torch.float64):
        dense = nn.Conv2d(4, 6, **geometry, dtype=torch.float64)
        assert block.dense_weight().shape == dense.weight.shape
        dense.weight = nn.Parameter(block.dense_weight())
        dense.bias = block.b.bias
        torch.testing.assert_close(block(x), dense(x))


def test_a_low_rank_linear_gives_what_its_dense_weight_gives() -> None:
    torch.manual_seed(0)
    block = LowRankLinear(5, 4, 2, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), functional.linear(x, block.dense_weight(), block.b.bias))
    assert block.a.bias is None
    assert block.weight.shape == (4, 5)


def test_parameters_and_macs_are_those_of_the_thin_layers() -> None:
    """By hand: 2 (5 + 4) + 4; 3 (4 3 + 6 3) + 6; 2 4 + 2 3 9 + 3 6 + 6. Outputs 5x5 of 5x5 inputs, padding 1."""
    linear = LowRankLinear(5, 4, 2)
    spatial, tucker = conv_blocks(kernel_size=3, padding=1)
    x = torch.zeros(1, 4, 5, 5)
    for block, args, params, macs in (
        (linear, torch.zeros(1, 5), 22, 18),
        (spatial, x, 96, 25 * 90),
        (tucker, x, 86, 25 * 80),
    ):
        assert count_params(block)[0] == params
        assert count_macs(block, (args,), {}).macs == macs


def test_a_grouped_convolution_has_its_rank_in_each_group() -> None:
    """Two groups of 2 -> 3 channels, by hand: 2 (3 (2 3 + 3 3)) + 6; 2 (2 2 + 2 3 9 + 3 3) + 6."""
    spatial, tucker = conv_blocks(kernel_size=3, padding=1, groups=2)
    assert (count_params(spatial)[0], count_params(tucker)[0]) == (96, 140)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_block_is_rebuilt_from_its_config_after_json(geometry: dict[str, Any]) -> None:
    bias = geometry.get("bias", True)
    for block in (LowRankLinear(5, 4, 2, bias=bias), *conv_blocks(**geometry)):
        again = BLOCKS[type(block).__name__].from_config(json.loads(json.dumps(block.config())))  # type: ignore[attr-defined]
        assert again.config() == block.config()
        assert {n: t.shape for n, t in again.state_dict().items()} == {
            n: t.shape for n, t in block.state_dict().items()
        }


def test_a_block_like_a_layer_takes_its_geometry_mode_and_dtype() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), groups=2, bias=False, dtype=torch.bfloat16).eval()
    for block in (SpatialConv2d.like(conv, 2), Tucker2Conv2d.like(conv, 1, 2)):
        assert block(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)).shape == (1, 6, 4, 8)
        assert not block.training
        assert not block.a.training
        assert block.b.bias is None
    linear = LowRankLinear.like(nn.Linear(5, 4, dtype=torch.float64), 2)
    assert linear.a.weight.dtype is torch.float64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"padding_mode": "circular"}, "padding_mode 'circular'"),
        ({"groups": 4}, "depthwise"),
        ({"groups": 3}, "are not divisible by 3 groups"),
        ({"padding": "same", "stride": 2}, "'same' needs stride 1"),
        ({"padding": "reflect"}, "padding must be integers, 'same' or 'valid'"),
    ],
)
def test_a_geometry_without_an_exact_form_is_refused(change: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"in_channels": 4, "out_channels": 12, "kernel_size": 3, **change}
    with pytest.raises(ValueError, match=said):
        SpatialConv2d(**arguments, rank=1)
    with pytest.raises(ValueError, match=said):
        Tucker2Conv2d(**arguments, rank_in=1, rank_out=1)


def test_a_rank_beyond_the_weights_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"between 1 and 4, not 5"):
        LowRankLinear(5, 4, 5)
    with pytest.raises(ValueError, match=r"between 1 and 12, not 13"):
        SpatialConv2d(4, 6, 3, rank=13)
    with pytest.raises(ValueError, match=r"rank_in must be between 1 and 2, not 3"):
        Tucker2Conv2d(4, 6, 3, rank_in=3, rank_out=1, groups=2)
