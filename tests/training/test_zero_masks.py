from __future__ import annotations

import pytest
import torch
from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.training.trainable_weights import ZeroMasks


def made() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        module[0].bias.zero_()
    return module


def test_zeros_are_held_as_positive_zero_and_biases_are_free() -> None:
    module = made()
    masks = ZeroMasks.of(module, ["0"])
    assert masks.count() == 2
    with torch.no_grad():
        module[0].weight.fill_(-5.0)
        module[0].bias.fill_(3.0)
    masks.hold()
    assert module[0].weight.tolist() == [[0.0, -5.0], [-5.0, 0.0]]
    assert not torch.signbit(module[0].weight).diagonal().any()
    assert module[0].bias.tolist() == [3.0, 3.0]


def test_gradients_of_zeros_are_dropped() -> None:
    module = made()
    masks = ZeroMasks.of(module, ["0.weight"])
    module(torch.ones(1, 2)).sum().backward()
    masks.drop_gradients()
    assert module[0].weight.grad is not None
    assert (module[0].weight.grad == 0).tolist() == [[True, False], [False, True]]


def test_a_shared_weight_counts_once_and_layers_without_zeros_hold_nothing() -> None:
    module = made()
    module[1].weight = module[0].weight
    masks = ZeroMasks.of(module, ["0", "1"])
    assert masks.count() == 2
    kept = masks.kept(module[1].weight)
    assert kept is not None
    assert kept.tolist() == [[False, True], [True, False]]
    assert ZeroMasks().count() == 0


def test_recurrent_weights_are_held_too() -> None:
    module = nn.Sequential(nn.LSTM(2, 3))
    with torch.no_grad():
        module[0].weight_hh_l0[0, 0] = 0
    assert ZeroMasks.of(module, ["0"]).count() == 1


def test_a_path_that_is_nothing_is_refused() -> None:
    with pytest.raises(TechniqueError, match="'fc'"):
        ZeroMasks.of(made(), ["fc"])
