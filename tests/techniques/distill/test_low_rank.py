from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.blocks import LowRankLinear
from omgoptim.errors import TechniqueError
from omgoptim.requests.distill import LowRank
from omgoptim.techniques.registry import apply_to_module


def mlp(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    body = [layer for _ in range(layers) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *body, nn.Linear(32, 4)).eval()


def ranks(module: nn.Module) -> dict[str, int]:
    return {path: layer.rank for path, layer in module.named_modules() if isinstance(layer, LowRankLinear)}


def test_layers_keep_the_share_of_their_parameters(run_of: Any, drawn: Any) -> None:
    """32 x 32: rank r has 64 r of 1,024 parameters; 32 x 8 and 4 x 32 have 40 r of 256 and 36 r of 128."""
    module = mlp()
    apply_to_module(module, LowRank(rank_ratio=0.3), run_of(module, drawn(64, 8)))
    assert ranks(module) == {"0": 1, "2": 4, "4": 4, "6": 4, "8": 1}


def test_data_tells_which_directions_matter(run_of: Any, drawn: Any) -> None:
    teacher, x = mlp(), drawn(256, 8)
    errors = {}
    for real in (False, True):
        module = copy.deepcopy(teacher)
        apply_to_module(module, LowRank(rank_ratio=0.4), run_of(teacher, x, real=real))
        with torch.no_grad():
            errors[real] = float((module(x) - teacher(x)).norm())
    assert errors[True] < 0.7 * errors[False]


def test_layers_left_out_and_layers_not_named_stay(run_of: Any, drawn: Any) -> None:
    module = mlp(4)
    run = run_of(module, drawn(64, 8))
    apply_to_module(module, LowRank(depth=0.5, targets=["[4-9]"], ignore=["8"]), run)
    assert all(isinstance(module[index], nn.Linear) for index in (0, 2))
    assert ranks(module)


def test_nothing_left_to_factorize_is_refused(run_of: Any, drawn: Any) -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = mlp(), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.body(x))

    module = Norms()
    with pytest.raises(TechniqueError, match="no layer can be factorized"):
        apply_to_module(module, LowRank(targets=["norm"]), run_of(module, drawn(64, 8)))
