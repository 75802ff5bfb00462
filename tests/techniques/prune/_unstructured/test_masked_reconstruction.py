"""Fitting what stayed: the exact solution row by row, and what must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.techniques.prune import _reconstruction
from omgoptim.techniques.prune._reconstruction import reconstruct_kept_weights
from omgoptim.techniques.registry import Outcome

RunOf = Callable[..., Any]
Drawn = Callable[..., Tensor]


def zeroed(module: nn.Module, fraction: float, seed: int = 0) -> nn.Module:
    """A copy with some weights of each layer zero."""
    sparse = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sparse.parameters():
        if parameter.ndim > 1:
            parameter.data[torch.rand(parameter.shape, generator=generator) < fraction] = 0.0
    return sparse


def net_of(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    if kind == "conv1d":
        last = nn.Conv1d(16, 4, 3, groups=2, bias=False)
        return nn.Sequential(nn.Conv1d(3, 16, 3, padding="same"), nn.ReLU(), last)
    first = nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 4, (3, 1), stride=2, dilation=2))


@pytest.mark.parametrize(("kind", "shape"), [("linear", (64, 12)), ("conv1d", (32, 3, 20)), ("conv2d", (16, 3, 9, 8))])
def test_outputs_come_nearer_to_what_they_were_and_zeros_stay_zeros(
    run_of: RunOf, drawn: Drawn, kind: str, shape: tuple[int, ...]
) -> None:
    net = net_of(kind)
    batches = [drawn(*shape, seed=seed) for seed in range(4)]
    for axis in range(1, len(shape)):  # neighbours are alike, as in real inputs
        batches = [batch.cumsum(axis) / 3 for batch in batches]
    sparse = zeroed(net, 0.5)
    fitted = copy.deepcopy(sparse)
    assert reconstruct_kept_weights(fitted, net, ["2", "0"], run_of(fitted, batches[:3])) == ["0", "2"]
    with torch.no_grad():
        wanted = net(batches[3])
        assert (fitted(batches[3]) - wanted).norm() < 0.5 * (sparse(batches[3]) - wanted).norm()
    for index in (0, 2):
        assert torch.equal(fitted[index].weight == 0, sparse[index].weight == 0)


def test_a_redundant_input_stands_in_for_its_twin_exactly(run_of: RunOf, drawn: Drawn) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 1))
    sparse = copy.deepcopy(net)
    sparse[0].weight.data[0, 1] = 0.0
    x = drawn(500, 1).expand(500, 2)  # both inputs are the same
    reconstruct_kept_weights(sparse, net, ["0"], run_of(sparse, [x.contiguous()]))
    assert sparse[0].weight[0, 0].item() == pytest.approx(net[0].weight.sum().item(), abs=0.02)
    assert sparse[0].weight[0, 1].item() == 0.0


def test_only_layers_that_run_once_own_their_weight_and_are_of_a_known_kind_are_fitted(
    run_of: RunOf, drawn: Drawn
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.tied, self.other, self.rnn = nn.Linear(4, 4), nn.Linear(4, 4), nn.GRU(4, 4)
            self.other.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            given: Tensor = self.rnn(self.other(self.tied(self.twice(self.twice(self.once(x))))))[0]
            return given

    net = Net()
    sparse = zeroed(net, 0.5)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    paths = ["once", "twice", "never", "tied", "rnn.weight_ih_l0"]
    assert reconstruct_kept_weights(sparse, net, paths, run_of(sparse, [drawn(8, 4)])) == ["once"]
    changed = {name for name, value in sparse.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"once.weight", "once.bias"}


def test_frozen_biases_the_model_before_and_modes_stay(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    sparse = zeroed(net, 0.5)
    sparse[0].bias.requires_grad = False
    bias, dense = sparse[0].bias.clone(), copy.deepcopy(net.state_dict())
    run = run_of(sparse, [drawn(16, 6)])
    sparse.train()
    reconstruct_kept_weights(sparse, net, ["0"], run)
    assert torch.equal(sparse[0].bias, bias)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in dense.items())
    assert sparse[1].training
    assert not sparse[0]._forward_hooks


def test_inputs_that_are_no_numbers_change_nothing(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    sparse = zeroed(net, 0.5)
    before = sparse[0].weight.detach().clone()
    run = run_of(sparse, [drawn(16, 6)])
    run.statistics.batches[0]["input"][0, 0] = float("nan")
    reconstruct_kept_weights(sparse, net, ["0"], run)
    assert torch.equal(sparse[0].weight, before)


def test_without_real_data_nothing_is_fitted_or_noted(run_of: RunOf, drawn: Drawn) -> None:
    from omgoptim.requests.prune import Magnitude

    net = nn.Sequential(nn.Linear(6, 4))
    sparse = zeroed(net, 0.5)
    run = replace(run_of(sparse, [drawn(16, 6)]), real=False)
    outcome = Outcome([])
    assert _reconstruction.reconstructed(outcome, sparse, net, Magnitude(), run) is outcome


def test_a_layer_whose_branch_is_not_taken_keeps_its_weights(run_of: RunOf, drawn: Drawn) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bright, self.dark = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.bright(x) if x.mean() > 0 else self.dark(x)
            return out

    net = Branches()
    sparse = copy.deepcopy(net)
    with torch.no_grad():
        sparse.bright.weight[:, 0], sparse.dark.weight[:, 0] = 0, 0
    before = sparse.dark.weight.detach().clone()
    batches = [drawn(8, 4).abs(), drawn(8, 4).abs()]
    assert reconstruct_kept_weights(sparse, net, ["bright", "dark"], run_of(sparse, batches)) == ["bright"]
    assert torch.equal(sparse.dark.weight, before)
