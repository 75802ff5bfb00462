"""Scores by hand, and input norms against unfolded inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omgoptim.techniques.prune._unstructured.parameter_selection import select
from omgoptim.techniques.prune._unstructured.saliency import input_norms, lamp, wanda

Drawn = Callable[..., Tensor]


def test_lamp_divides_by_the_energy_of_what_is_not_smaller() -> None:
    # squares 1, 4, 9: 1/14, 4/13, 9/9
    scores = lamp(torch.tensor([[-2.0, 1.0, 3.0]]))
    assert scores.flatten().tolist() == pytest.approx([4 / 13, 1 / 14, 1.0])


def test_lamp_of_equals_falls_with_their_position_and_of_zeros_is_zero() -> None:
    assert lamp(torch.tensor([2.0, 0.0, -2.0])).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_lamp_does_not_depend_on_a_layers_scale(drawn) -> None:  # type: ignore[no-untyped-def]
    weight = drawn(8, 4, 3, 3)
    assert torch.allclose(lamp(weight), lamp(1000 * weight))


def test_lamp_keeps_the_order_of_magnitudes_within_a_layer(drawn) -> None:  # type: ignore[no-untyped-def]
    weight = drawn(50)
    assert torch.equal(lamp(weight).argsort(), weight.abs().argsort())


def test_wanda_multiplies_magnitude_and_input_norm() -> None:
    rows = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert wanda(rows, torch.tensor([10.0, 2.0])).tolist() == [[10.0, 4.0], [30.0, 1.0]]
    each = torch.tensor([[1.0, 1.0], [0.0, 4.0]])
    assert wanda(rows, each).tolist() == [[1.0, 2.0], [0.0, 2.0]]


def norms_of(module: nn.Module, batches: list[Any], run_of: Callable[..., Any]) -> dict[str, Tensor]:
    return input_norms(module, select(module, [], []).weights, run_of(module, batches))


def test_a_linears_norms_are_those_of_its_features_over_all_batches_and_positions(
    run_of: Callable[..., Any], drawn: Drawn
) -> None:
    batches = [drawn(3, 5, 4), drawn(2, 5, 4, seed=1)]
    norms = norms_of(nn.Sequential(nn.Linear(4, 2)), batches, run_of)
    assert torch.allclose(norms["0"], torch.cat([batch.reshape(-1, 4) for batch in batches]).norm(dim=0))


CONVOLUTIONS = [
    {"padding": 1},
    {"padding": 0, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": 1, "groups": 2},
    {"padding": 1, "groups": 4, "out_channels": 8},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "circular", "stride": (2, 1)},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolutions_norms_are_those_of_its_unfolded_input(
    options: dict[str, Any], run_of: Callable[..., Any], drawn: Drawn
) -> None:
    options = {"out_channels": 6, **options}
    conv = nn.Conv2d(4, kernel_size=(3, 3), **options)
    x = drawn(3, 4, 9, 8)
    norms = norms_of(nn.Sequential(conv), [x], run_of)["0"]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    patches = functional.unfold(padded, (3, 3), conv.dilation, 0, conv.stride)
    expected = patches.norm(dim=2).square().sum(0).sqrt().reshape(4, 9)  # (channels, positions)
    each = 4 // conv.groups
    for output in range(conv.out_channels):
        group = output // (conv.out_channels // conv.groups)
        mine = expected[group * each : (group + 1) * each].T.flatten()  # positions first, as in to_rows
        assert torch.allclose(norms[output], mine, rtol=1e-5)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_of_one_and_three_dimensions_are_read_like_those_of_two(
    dimensions: int, run_of: Callable[..., Any], drawn: Drawn
) -> None:
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    x = drawn(2, 3, *[5] * dimensions)
    norms = norms_of(nn.Sequential(kind(3, 2, 3, padding=1, bias=False)), [x], run_of)["0"]
    # the squared norm is what a convolution with one weight at that place gives, squared and summed
    for position in (0, 3**dimensions // 2, 3**dimensions - 1):
        for channel in range(3):
            weight = torch.zeros(1, 3, 3**dimensions)
            weight[0, channel, position] = 1
            convolve = {1: functional.conv1d, 3: functional.conv3d}[dimensions]
            seen = convolve(x, weight.reshape(1, 3, *[3] * dimensions), padding=1)
            assert norms[0, position * 3 + channel].item() == pytest.approx(seen.norm().item(), rel=1e-5)


def test_a_transposed_convolutions_norms_are_those_of_its_input_channels(
    run_of: Callable[..., Any], drawn: Drawn
) -> None:
    x = drawn(2, 4, 5)
    norms = norms_of(nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2)), [x], run_of)["0"]
    expected = x.transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(norms[0], expected[:2].repeat(3))
    assert torch.allclose(norms[5], expected[2:].repeat(3))


class Attention(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.rnn, self.unused = nn.GRU(4, 3), nn.Linear(4, 4)

    def forward(self, query: Tensor, other: Tensor) -> Tensor:
        given: Tensor = self.attend(query, other, value=other)[0]
        self.rnn(given)
        return given


def test_an_attentions_projections_read_query_key_and_value(run_of: Callable[..., Any], drawn: Drawn) -> None:
    query, other = drawn(2, 3, 4), drawn(2, 5, 4, seed=1)
    norms = norms_of(Attention(), [(query, other)], run_of)
    assert set(norms) == {"attend.in_proj_weight"}  # the others are not called, or keep their states inside
    assert norms["attend.in_proj_weight"].shape == (12, 4)
    assert torch.allclose(norms["attend.in_proj_weight"][0], query.reshape(-1, 4).norm(dim=0))
    for row in (4, 11):
        assert torch.allclose(norms["attend.in_proj_weight"][row], other.reshape(-1, 4).norm(dim=0))
    other = drawn(2, 5, 3)
    norms = norms_of(Attention(kdim=3, vdim=3), [(query, other)], run_of)
    assert torch.allclose(norms["attend.k_proj_weight"], other.reshape(-1, 3).norm(dim=0))


def test_a_layer_inside_a_transformer_is_seen_though_its_fused_path_would_pass_it_by(
    run_of: Callable[..., Any], drawn: Drawn
) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    norms = norms_of(encoder, [drawn(2, 3, 8)], run_of)
    assert set(norms) == {"self_attn.in_proj_weight", "linear1", "linear2"}


def test_a_shared_weight_adds_what_all_its_layers_read_and_the_module_is_left_as_it_was(
    run_of: Callable[..., Any], drawn: Drawn
) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Dropout(0.5))
    net[1].weight = net[0].weight
    x = drawn(4, 3)
    run = run_of(net, [x])
    net.train()
    norms = input_norms(net, select(net, [], []).weights, run)
    assert torch.allclose(norms["0"], torch.cat([x, net[0](x)]).norm(dim=0))
    assert net.training
    assert net[2].training
    assert not net[0]._forward_pre_hooks
