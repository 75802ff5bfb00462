from __future__ import annotations

import pytest
import torch
from torch import nn

from omgoptim.measure.self_time import ROOT, evaluation_mode, self_cost


class Ticking(nn.Module):
    """Adds to a shared counter before, between and after its children."""

    def __init__(self, counter, ticks, *children):
        super().__init__()
        self.counter, self.ticks = counter, ticks
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        self.counter[0] += self.ticks
        for part in self.parts:
            x = part(x)
        return x


def test_each_module_is_charged_what_it_did_itself():
    counter = [0]
    inner = Ticking(counter, 5)
    net = Ticking(counter, 1, Ticking(counter, 10, inner), inner)
    with self_cost(net, lambda: counter[0]) as costs:
        net(torch.zeros(1))
        net(torch.zeros(1))
    assert costs == {ROOT: 2, "parts.0": 20, "parts.0.parts.0": 20}


def test_a_module_that_raises_inside_another_does_not_upset_the_rest():
    class Failing(Ticking):
        def forward(self, x):
            super().forward(x)
            raise ValueError("no")

    class Careful(Ticking):
        def forward(self, x):
            self.counter[0] += self.ticks
            with pytest.raises(ValueError, match="no"):
                self.parts[0](x)
            return self.parts[1](x)

    counter = [0]
    net = Careful(counter, 1, Failing(counter, 10), Ticking(counter, 100))
    with self_cost(net, lambda: counter[0]) as costs:
        net(torch.zeros(1))
    assert costs == {ROOT: 1, "parts.0": 10, "parts.1": 100}


def test_evaluating_puts_every_mode_back_even_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    net[1].eval()
    with evaluation_mode(net):
        assert not any(part.training for part in net.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="2D or 3D"), evaluation_mode(net):
        net(torch.zeros(2))
    assert [part.training for part in net.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
