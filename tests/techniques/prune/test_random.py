"""Random pruning: the seed decides, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.requests.prune import Random
from omgoptim.techniques.registry import apply_to_module

RunOf = Callable[..., Any]
Drawn = Callable[..., Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 30))


def mask_of(run_of: RunOf, x: Tensor, seed: int, *sparsities: float, **options: Any) -> Tensor:
    module = net()
    for sparsity in sparsities:
        apply_to_module(module, Random(sparsity=sparsity, **options), run_of(module, [x], seed=seed))
    return torch.cat([(module[0].weight == 0).flatten(), (module[2].weight == 0).flatten()])


def test_the_same_seed_gives_the_same_weights_whatever_torchs_state_and_another_seed_others(
    run_of: RunOf, drawn: Drawn
) -> None:
    x = drawn(4, 30)
    first = mask_of(run_of, x, 3, 0.5)
    torch.rand(17)
    assert torch.equal(mask_of(run_of, x, 3, 0.5), first)
    other = mask_of(run_of, x, 4, 0.5)
    assert int((other & first).sum()) == pytest.approx(300, abs=60)  # as many in common as chance gives
    assert int(first.sum()) == int(other.sum()) == 600


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("ratios", ["uniform", "erdos_renyi"])
def test_more_sparsity_takes_the_same_weights_and_more(run_of: RunOf, drawn: Drawn, scope: str, ratios: str) -> None:
    x = drawn(4, 30)
    options = {"scope": scope, "layer_ratios": ratios}
    half, most = mask_of(run_of, x, 0, 0.5, **options), mask_of(run_of, x, 0, 0.5, 0.9, **options)
    assert (int(half.sum()), int(most.sum())) == (600, 1080)
    assert bool((most | ~half).all())


def test_large_weights_go_as_often_as_small_ones(run_of: RunOf, drawn: Drawn) -> None:
    gone = mask_of(run_of, drawn(4, 30), 0, 0.5)
    magnitude = torch.cat([net()[0].weight.flatten(), net()[2].weight.flatten()]).abs()
    large = magnitude > magnitude.median()
    assert int((gone & large).sum()) == pytest.approx(300, abs=50)
