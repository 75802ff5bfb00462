from __future__ import annotations

import json
from typing import Any

import pruning_nets as nets
import pytest
import torch
from torch import nn

from omgoptim.blocks import BLOCKS, InvertedResidual
from omgoptim.measure.size import count_params


@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (16, 2), (8, 2), (16, 1)])
def test_it_gives_what_the_block_as_mobilenet_writes_it_gives(outputs: int, stride: int) -> None:
    torch.manual_seed(0)
    written = nets.Inverted(8, outputs, stride).eval()  # expansion 4
    block = InvertedResidual(8, outputs, 3, stride=stride, expansion=4).eval()
    layers = [block.expand[0], block.expand[1], block.depthwise, block.norm, block.project, block.project_norm]
    for theirs, own in zip([written.layers[i] for i in (0, 1, 3, 4, 6, 7)], layers, strict=True):
        own.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(block(x), written(x))
    assert block.adds_input is written.adds


def test_parameters_are_those_counted_by_hand() -> None:
    """3x3, 64 -> 128, expansion 2: 128 (64 + 9 + 128), and 2 (128 + 128 + 128) of the norms."""
    assert count_params(InvertedResidual(64, 128, expansion=2))[0] == 25_728 + 768
    assert count_params(InvertedResidual(64, 128, expansion=1))[0] == 64 * (9 + 128) + 2 * (64 + 128)


@pytest.mark.parametrize(
    ("geometry", "adds"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 3, "padding": 0}, False),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, True),
        ({"kernel_size": 5, "padding": "same"}, True),
        ({"kernel_size": 3, "padding": "valid"}, False),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2])
def test_it_stands_where_a_convolution_stood_and_adds_its_input_only_where_that_fits(
    geometry: dict[str, Any], adds: bool, dims: int
) -> None:
    conv = (nn.Conv1d if dims == 1 else nn.Conv2d)(4, 4, **geometry).eval()
    block = InvertedResidual.like(conv, expansion=1.5, residual=True)
    x = torch.randn(2, 4, *[9] * dims)
    assert block(x).shape == conv(x).shape
    assert block.adds_input is adds
    assert not InvertedResidual.like(conv).adds_input
    assert block.hidden == 6


@pytest.mark.parametrize("residual", [True, False])
def test_its_configuration_builds_it_again(residual: bool) -> None:
    block = InvertedResidual(4, 4, (3, 5), padding=(1, 2), expansion=2.5, residual=residual).eval()
    assert BLOCKS["InvertedResidual"] is InvertedResidual
    again = InvertedResidual.from_config(json.loads(json.dumps(block.config()))).eval()
    again.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(again(x), block(x))
    assert again.adds_input is residual


def test_an_expansion_that_narrows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        InvertedResidual(4, 4, expansion=0.5)


@pytest.mark.parametrize(("outputs", "expansion"), [(10, 9), (4, 4)])
@pytest.mark.parametrize("dims", [1, 2])
def test_with_as_many_kernels_as_a_channel_has_it_begins_as_the_convolution(
    outputs: int, expansion: int, dims: int
) -> None:
    """Inputs are not negative, as after a ReLU."""
    torch.manual_seed(0)
    conv = (nn.Conv1d if dims == 1 else nn.Conv2d)(4, outputs, 3, padding=1).eval()
    block = InvertedResidual.from_conv(conv, expansion)
    assert not block.adds_input
    assert not block.training
    x = torch.rand(2, 4, *[8] * dims)
    torch.testing.assert_close(block(x), conv(x), rtol=1e-4, atol=1e-4)


def test_with_fewer_kernels_it_begins_nearer_to_the_convolution_than_nothing() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1).eval()
    x = torch.rand(2, 8, 8, 8)
    with torch.no_grad():
        given = conv(x)
        errors = [float((InvertedResidual.from_conv(conv, by)(x) - given).norm() / given.norm()) for by in (1, 2, 4, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8
    assert errors[-1] < 1e-3


def test_what_has_no_such_form_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2"):
        InvertedResidual.from_conv(nn.Conv2d(4, 4, 3, groups=2))
