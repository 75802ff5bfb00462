"""Magnitude pruning: torch's own choice, shares among layers, and what is fitted afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from omgoptim.errors import TechniqueError
from omgoptim.requests.prune import Magnitude
from omgoptim.techniques.registry import apply_to_module

RunOf = Callable[..., Any]
Drawn = Callable[..., Tensor]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()


def masks(module: nn.Module) -> list[Tensor]:
    return [layer.weight == 0 for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def zeros(module: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in masks(module))


def chosen_by(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(layer, "weight") for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_the_weights_are_those_that_torch_would_choose_of_all(run_of: RunOf, drawn: Drawn, sparsity: float) -> None:
    ours, theirs = net(), net()
    apply_to_module(ours, Magnitude(sparsity=sparsity, targets=["*"]), run_of(ours, [drawn(2, 3, 6, 6)]))
    count = 216 + 576 + 1280
    torch_prune.global_unstructured(chosen_by(theirs), torch_prune.L1Unstructured, amount=round(sparsity * count))
    assert all(
        torch.equal(mine, layer.weight_mask == 0)
        for mine, (layer, _) in zip(masks(ours), chosen_by(theirs), strict=True)
    )


def test_the_weights_are_those_that_torch_would_choose_of_each_layer(run_of: RunOf, drawn: Drawn) -> None:
    ours, theirs = net(), net()
    apply_to_module(ours, Magnitude(sparsity=0.75, scope="per_layer", targets=["*"]), run_of(ours, [drawn(2, 3, 6, 6)]))
    for mask, (layer, name) in zip(masks(ours), chosen_by(theirs), strict=True):
        torch_prune.l1_unstructured(layer, name, amount=0.75)
        assert torch.equal(mask, layer.weight_mask == 0)


@pytest.mark.parametrize("ratios", ["uniform", "erdos_renyi", "lamp"])
@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_a_schedule_ends_at_its_goal_exactly(run_of: RunOf, drawn: Drawn, ratios: str, scope: str) -> None:
    module = net()
    for sparsity in (0.5, 0.75, 0.9):
        params = Magnitude(sparsity=sparsity, scope=scope, layer_ratios=ratios)
        apply_to_module(module, params, run_of(module, [drawn(8, 3, 6, 6)]))
        assert zeros(module) == round(sparsity * 2072)


def test_lamp_ranks_layers_of_other_scales_alike_and_plain_magnitude_does_not(run_of: RunOf, drawn: Drawn) -> None:
    shares = {}
    for ratios in ("uniform", "lamp"):
        module = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
        module[1].weight.data.copy_(1e6 * module[0].weight)
        apply_to_module(module, Magnitude(sparsity=0.5, layer_ratios=ratios), run_of(module, [drawn(4, 30)]))
        shares[ratios] = [int((layer.weight == 0).sum()) for layer in module]
    assert shares["uniform"] == [899, 1]
    assert shares["lamp"] == pytest.approx([450, 450], abs=1)


def test_erdos_renyi_leaves_more_to_layers_of_few_weights(run_of: RunOf, drawn: Drawn) -> None:
    module = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 100), nn.Linear(100, 100))
    params = Magnitude(sparsity=0.8, layer_ratios="erdos_renyi")
    outcome = apply_to_module(module, params, run_of(module, [drawn(4, 100)]))
    kept = [int((layer.weight != 0).sum()) for layer in module]
    assert sum(kept) == 2400
    assert kept == pytest.approx([2400 * sides / 420 for sides in (110, 110, 200)], abs=1)
    assert outcome.changed[0].what == "magnitude, erdos renyi"


def test_with_real_data_what_stays_is_fitted_and_less_is_lost(run_of: RunOf, drawn: Drawn) -> None:
    batches = [drawn(32, 3, 6, 6, seed=seed) for seed in range(4)]
    lost = {}
    for real in (False, True):
        module = net()
        wanted = net()(batches[0])
        run = replace(run_of(module, batches), real=real)
        outcome = apply_to_module(module, Magnitude(sparsity=0.6), run)
        lost[real] = ((module(batches[0]) - wanted).norm() / wanted.norm()).item()
        assert zeros(module) == round(0.6 * 2072)
        assert len(outcome.notes) == (2 if real else 1)
    assert lost[True] < 0.8 * lost[False]


def test_the_same_run_gives_the_same_bits(run_of: RunOf, drawn: Drawn) -> None:
    modules = [net(), net()]
    for module in modules:
        apply_to_module(module, Magnitude(sparsity=0.6), run_of(module, [drawn(16, 3, 6, 6)]))
    assert all(torch.equal(a, b) for a, b in zip(*(module.state_dict().values() for module in modules), strict=True))


def test_a_recurrent_net_and_attention_are_pruned_without_their_biases(run_of: RunOf, drawn: Drawn) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.rnn = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            given: Tensor = self.rnn(self.attend(x, x, x)[0])[0]
            return given

    module = Sequence()
    x = drawn(2, 5, 8)
    outcome = apply_to_module(module, Magnitude(sparsity=0.5), run_of(module, [x]))
    weights = dict(module.named_parameters())
    changed = ["attend.in_proj_weight", "attend.out_proj", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert [change.path for change in outcome.changed] == changed
    count = 192 + 64 + 192 + 144
    pruned = [weights[path if path in weights else f"{path}.weight"] for path in changed]
    assert sum(int((weight == 0).sum()) for weight in pruned) == count // 2
    assert bool((module.rnn.bias_ih_l0 != 0).all())
    assert module(x).shape == (2, 5, 6)


def test_ignored_layers_stay_and_do_not_count(run_of: RunOf, drawn: Drawn) -> None:
    module = net()
    apply_to_module(module, Magnitude(sparsity=0.5, ignore=["5"]), run_of(module, [drawn(2, 3, 6, 6)]))
    assert [int(mask.sum()) for mask in masks(module)][2] == 0
    assert zeros(module) == 396


def test_a_module_without_prunable_layers_is_refused(run_of: RunOf, drawn: Drawn) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    with pytest.raises(TechniqueError, match="no weight to prune"):
        apply_to_module(module, Magnitude(), run_of(module, [drawn(4, 3)]))
