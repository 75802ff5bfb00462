from __future__ import annotations

import pytest
import torch
from torch import nn

from omgoptim.techniques.prune._channels.groups import (
    as_rows,
    channel_groups,
    cut,
    is_depthwise,
    width_of,
    without_reads,
)

KEEP = torch.tensor([0, 2])


def test_a_convolution_without_channels_gives_those_that_are_left() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    full = layer(x)
    cut(layer, "out", KEEP)
    assert (layer.out_channels, layer.weight.shape, layer.bias.shape) == (2, (2, 3, 3, 3), (2,))
    torch.testing.assert_close(layer(x), full[:, KEEP])


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 3, 3), nn.ConvTranspose2d(4, 3, 2, 2), nn.Conv1d(4, 3, 1), nn.Linear(4, 3)], ids=repr
)
def test_what_does_not_read_a_channel_gives_what_it_gave_with_zeros_there(layer: nn.Module) -> None:
    shape = {nn.Linear: (2, 4), nn.Conv1d: (2, 4, 6)}.get(type(layer), (2, 4, 6, 6))
    x = torch.randn(shape)
    zeroed, axis = x.clone(), -1 if isinstance(layer, nn.Linear) else 1
    zeroed.index_fill_(axis, torch.tensor([1, 3]), 0)
    expected = layer(zeroed)
    with torch.no_grad():
        weight, layer.weight.data = layer.weight.data, without_reads(layer, torch.tensor([1, 3]))  # type: ignore[assignment]
        torch.testing.assert_close(layer(x), expected)
        layer.weight.data = weight  # type: ignore[assignment]
    cut(layer, "in", KEEP)
    torch.testing.assert_close(layer(x.index_select(axis, KEEP)), expected)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_grouped_convolution_loses_the_same_channels_from_each_group(kind: type[nn.Conv2d]) -> None:
    layer, x = kind(4, 8, 3, groups=2), torch.randn(2, 4, 6, 6)
    zeroed = x.clone()
    zeroed[:, [1, 3]] = 0
    outputs = torch.tensor([0, 3, 4, 7])
    expected = layer(zeroed)[:, outputs]
    cut(layer, "in", KEEP)
    cut(layer, "out", outputs)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (2, 4, 2)
    torch.testing.assert_close(layer(x[:, KEEP]), expected)


def test_other_channels_from_one_group_than_from_another_are_refused() -> None:
    for side, keep in (("in", [0, 3]), ("out", [0, 1, 2])):
        with pytest.raises(ValueError, match="same channels in each"):
            cut(nn.Conv2d(4, 4, 1, groups=2), side, torch.tensor(keep))  # type: ignore[arg-type]


def test_a_depthwise_convolution_has_one_side() -> None:
    layer, x = nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 5, 5)
    assert is_depthwise(layer)
    assert channel_groups(layer) == 1
    full = layer(x)
    cut(layer, "out", KEEP)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (2, 2, 2)
    torch.testing.assert_close(layer(x[:, KEEP]), full[:, KEEP])


def test_a_batch_norm_keeps_the_statistics_of_what_is_left() -> None:
    layer = nn.BatchNorm2d(3).eval()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    cut(layer, "out", KEEP)
    assert layer.num_features == 2
    assert layer.running_mean.tolist() == [1.0, 3.0]
    assert not isinstance(layer.running_mean, nn.Parameter)
    assert "running_mean" in dict(layer.named_buffers())


def test_a_group_norm_loses_whole_groups_exactly() -> None:
    layer, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 5)
    full, keep = layer(x), torch.tensor([2, 3, 6, 7])
    cut(layer, "out", keep, norm_groups=2)
    torch.testing.assert_close(layer(x[:, keep]), full[:, keep])


def test_a_frozen_tensor_stays_frozen() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    cut(layer, "out", KEEP)
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_rows_of_a_grouped_convolution_belong_to_the_channel_that_they_read() -> None:
    layer = nn.Conv2d(4, 2, 1, groups=2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 2, 1, 1)
    assert as_rows(layer, "in", layer.weight).tolist() == [[1.0], [2.0], [3.0], [4.0]]
    assert as_rows(layer, "out", layer.weight).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_layer_that_cannot_be_cut_has_no_width() -> None:
    assert width_of(nn.LayerNorm(4), "out") is None
    assert width_of(nn.Linear(3, 4), "in") == 3
