"""Wanda: the score by hand, its rows, and the layers that it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.requests.prune import Wanda
from omgoptim.techniques.prune.wanda import INPUTS_NOT_SEEN
from omgoptim.techniques.registry import apply_to_module

RunOf = Callable[..., Any]
Drawn = Callable[..., Tensor]


def test_a_small_weight_of_a_loud_input_outlives_a_large_one_of_a_quiet_input(run_of: RunOf) -> None:
    layer = nn.Sequential(nn.Linear(3, 2, bias=False))
    layer[0].weight.data.copy_(torch.tensor([[0.1, 3.0, 1.0], [0.2, 0.5, -9.0]]))
    x = torch.tensor([[100.0, 1.0, 0.0], [100.0, 1.0, 0.0]])  # norms 141, 1.4, 0
    run = replace(run_of(layer, [x]), real=False)
    apply_to_module(layer, Wanda(sparsity=0.34), run)
    assert torch.equal(layer[0].weight, torch.tensor([[0.1, 3.0, 0.0], [0.2, 0.5, 0.0]]))
    apply_to_module(layer, Wanda(sparsity=0.67), run)
    assert (layer[0].weight != 0).tolist() == [[True, False, False], [True, False, False]]


@pytest.mark.parametrize("scope", ["per_row", "per_layer", "global"])
def test_the_fraction_is_exact_and_rows_give_alike_where_asked(run_of: RunOf, drawn: Drawn, scope: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 6)
    )
    outcome = apply_to_module(net, Wanda(sparsity=0.5, scope=scope), run_of(net, [drawn(8, 4, 6, 6)]))
    assert [change.path for change in outcome.changed] == ["0", "2", "4"]
    assert sum(int((net[index].weight == 0).sum()) for index in (0, 2, 4)) == (144 + 288 + 864) // 2
    if scope == "per_row":
        assert (net[0].weight == 0).flatten(1).sum(1).tolist() == [9] * 8
        assert (net[2].weight == 0).sum((0, 2, 3)).tolist() == [36] * 4
        assert (net[4].weight == 0).sum(1).tolist() == [72] * 6


def test_silent_inputs_go_first_in_a_convolution_too(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = drawn(8, 4, 6, 6)
    x[:, 2] = 0
    apply_to_module(net, Wanda(sparsity=0.25), run_of(net, [x]))
    assert not bool(net[0].weight[:, 2].any())
    assert bool((net[0].weight[:, [0, 1, 3]] != 0).all())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 10)
        self.idle = nn.Linear(4, 10)  # an expert that no sample is sent to

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.head(self.rnn(x)[0]) + self.idle(x[:0]).sum()
        return given


def test_weights_without_visible_inputs_stay_do_not_count_and_are_reported(run_of: RunOf, drawn: Drawn) -> None:
    net = Recurrent()
    outcome = apply_to_module(net, Wanda(sparsity=0.5), run_of(net, [drawn(2, 5, 4)]))
    assert int((net.head.weight == 0).sum()) == 30
    assert {(skip.path, skip.reason) for skip in outcome.skipped} == {
        ("rnn.weight_ih_l0", INPUTS_NOT_SEEN),
        ("rnn.weight_hh_l0", INPUTS_NOT_SEEN),
        ("idle", INPUTS_NOT_SEEN),
    }
    with pytest.raises(TechniqueError, match="Wanda finds no layer inputs") as error:
        apply_to_module(net, Wanda(targets=["rnn"]), run_of(net, [drawn(2, 5, 4)]))
    assert "use method magnitude" in error.value.fix


def test_no_label_is_read(run_of: RunOf, drawn: Drawn) -> None:
    def refuse(outputs: Any, target: Any) -> Tensor:
        raise AssertionError("the loss was asked")

    net = nn.Sequential(nn.Linear(8, 8))
    apply_to_module(net, Wanda(sparsity=0.5), run_of(net, [drawn(4, 8)], loss=refuse))
