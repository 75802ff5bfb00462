from __future__ import annotations

import copy

import torch
from torch import nn

from omgoptim.techniques.distill._student.derivation import reinitialize


class Scale(nn.Module):
    """A layer without a way to begin anew."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)
        self.one = nn.Parameter(torch.tensor([7.0]))


def built() -> nn.Module:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 0.5 + 2
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2), Scale(values))


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    one, same, other = built(), built(), built()
    for module, seed in ((one, 3), (same, 3), (other, 4)):
        reinitialize(module, seed)
    state = one.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert not torch.equal(other[0].weight, one[0].weight)


def test_layers_begin_as_they_are_built() -> None:
    module = built()
    before = copy.deepcopy(module)
    with torch.no_grad():
        module[1].running_mean.fill_(5.0)
        module[1].weight.fill_(5.0)
        module[2].in_proj_bias.fill_(5.0)
    reinitialize(module, 0)
    assert not torch.equal(module[0].weight, before[0].weight)
    assert torch.equal(module[1].running_mean, torch.zeros(4))
    assert torch.equal(module[1].weight, torch.ones(4))
    assert torch.equal(module[2].in_proj_bias, torch.zeros(12))


def test_a_layer_that_cannot_begin_anew_keeps_mean_and_deviation_of_its_weights() -> None:
    module = built()
    before = module[3].weight.detach().clone()
    reinitialize(module, 0)
    assert not torch.equal(module[3].weight, before)
    assert abs(float(module[3].weight.detach().mean()) - 2) < 0.05
    assert abs(float(module[3].weight.detach().std()) - 0.5) < 0.05
    assert module[3].one.item() == 7.0


def test_the_random_numbers_of_others_go_on_as_if_nothing_was_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    module = built()
    torch.manual_seed(0)
    reinitialize(module, 5)
    assert torch.equal(torch.randn(3), expected)
