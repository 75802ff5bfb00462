"""Gradient scores by hand, and what happens where there is no gradient or no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omgoptim.errors import TechniqueError
from omgoptim.requests.prune import Gradient
from omgoptim.techniques.prune import gradient
from omgoptim.techniques.registry import apply_to_module

RunOf = Callable[..., Any]
Drawn = Callable[..., Tensor]


def squared(outputs: Tensor, target: Any) -> Tensor:
    wanted = torch.zeros_like(outputs) if target is None else torch.as_tensor(target)
    return 0.5 * (outputs - wanted).square().sum()


def line(*weights: float) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    net[0].weight.data.copy_(torch.tensor([weights]))
    return net


def test_sensitivity_is_weight_times_mean_gradient(run_of: RunOf) -> None:
    # outputs 1 + 2 - 4 = -1 and 1 - 2 - 4 = -5 for targets 0: g = -1 (1, 1, 1) - 5 (1, -1, 1) = (-6, 4, -6)
    net = line(1.0, 2.0, -4.0)
    batches = [torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, -1.0, 1.0]])]
    run = replace(run_of(net, batches, loss=squared), real=False)
    scores = gradient._sensitivity(net, gradient.select(net, [], []).weights, run)
    assert scores["0"].tolist() == [[6.0, 8.0, 24.0]]
    apply_to_module(net, Gradient(sparsity=0.34), run)
    assert net[0].weight.tolist() == [[0.0, 2.0, -4.0]]


def test_movement_sums_over_steps_that_are_undone(run_of: RunOf) -> None:
    # one weight w, loss w^2 / 2, gradient w: -w^2, then after a step of 0.01 -(0.99 w)^2
    net = line(2.0)
    run = run_of(net, [torch.tensor([[1.0]]), torch.tensor([[1.0]])], loss=squared)
    scores = gradient._movement(net, gradient.select(net, [], []).weights, run)
    assert scores["0"].item() == pytest.approx(-4 - 4 * 0.99**2)
    assert net[0].weight.item() == 2.0


def test_what_moves_towards_zero_goes_before_what_moves_away(run_of: RunOf) -> None:
    net = line(1.0, 1.0)
    # the target wants the first weight larger and the second smaller
    x = torch.eye(2)
    run = run_of(net, [x], [np.array([[3.0], [-1.0]], np.float32)], loss=squared)
    apply_to_module(net, Gradient(sparsity=0.5, score="movement"), replace(run, real=False))
    assert net[0].weight.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("score", ["sensitivity", "movement"])
@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_the_fraction_is_exact_and_the_model_is_left_in_its_mode_without_gradients(
    run_of: RunOf, drawn: Drawn, score: str, scope: str
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    run = run_of(
        net, [drawn(8, 8)], [np.arange(8) % 4], loss=lambda o, t: functional.cross_entropy(o, torch.as_tensor(t))
    )
    net.train()
    before = net[1].running_mean.clone()
    apply_to_module(net, Gradient(sparsity=0.5, score=score, scope=scope), run)
    assert int((net[0].weight == 0).sum()) + int((net[3].weight == 0).sum()) == 96
    assert torch.equal(net[1].running_mean, before)
    assert net[2].training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_weights_without_a_gradient_stay_and_are_reported(run_of: RunOf, drawn: Drawn) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            given: Tensor = self.last(self.first(x).detach()) + self.idle(x[:0]).sum()
            return given

    net = Cut()
    outcome = apply_to_module(net, Gradient(sparsity=0.5), run_of(net, [drawn(4, 4)]))
    assert [skip.path for skip in outcome.skipped] == ["first", "idle"]
    assert {skip.reason for skip in outcome.skipped} == {gradient.NO_GRADIENT}
    assert int((net.last.weight == 0).sum()) == 8
    with pytest.raises(TechniqueError, match="the loss has no gradient with respect") as error:
        apply_to_module(net, Gradient(targets=["first"]), run_of(net, [drawn(4, 4)]))
    assert "magnitude" in error.value.fix


def test_a_loss_that_is_no_number_is_an_error_and_movement_puts_the_weights_back(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    before = net[0].weight.detach().clone()
    losses = iter([1.0, float("nan")])
    run = run_of(net, [drawn(4, 4), drawn(4, 4, seed=1)], loss=lambda outputs, _: outputs.sum() * next(losses))
    with pytest.raises(TechniqueError, match="saliency cannot be computed") as error:
        apply_to_module(net, Gradient(score="movement"), run)
    assert "batch 2" in error.value.why
    assert torch.equal(net[0].weight, before)
