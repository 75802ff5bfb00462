from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.techniques.distill._student.derivation import output_shapes, refuse_other_shapes
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]


class Two(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"logits": self.head(hidden), "hidden": hidden}


def test_shapes_are_those_of_all_outputs_for_two_samples(run_of: RunOf, drawn: Any) -> None:
    module = Two()
    run = run_of(module, drawn(5, 4))
    module.train()
    assert output_shapes(module, run) == [(2, 3), (2, 6)]
    assert module.training


def test_the_layer_that_fails_is_named(run_of: RunOf, drawn: Any) -> None:
    module = Two()
    run = run_of(module, drawn(5, 4))
    module.body[0] = nn.Linear(4, 5)
    with pytest.raises(TechniqueError, match="the student does not run") as refused:
        output_shapes(module, run)
    assert "layer 'head' failed" in refused.value.why
    assert "ignore" in refused.value.fix


def test_a_forward_that_fails_between_its_layers_is_named_as_such(run_of: RunOf, drawn: Any) -> None:
    class Fixed(Two):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.body(x).view(-1, 6))}

    module = Fixed()
    run = run_of(module, drawn(5, 4))
    module.body[0] = nn.Linear(4, 5)
    with pytest.raises(TechniqueError) as refused:
        output_shapes(module, run)
    assert "the model's own forward failed" in refused.value.why


def test_outputs_of_other_shapes_are_refused(run_of: RunOf, drawn: Any) -> None:
    run = run_of(Two(), drawn(5, 4))
    refuse_other_shapes(Two(), [(2, 3), (2, 6)], run)
    with pytest.raises(TechniqueError, match="other shapes") as refused:
        refuse_other_shapes(Two(classes=2), [(2, 3), (2, 6)], run)
    assert "(2, 2)" in refused.value.why


def test_checking_draws_no_random_numbers(run_of: RunOf, drawn: Any) -> None:
    module = Two()
    run = run_of(module, drawn(5, 4))
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    output_shapes(module, run)
    assert torch.equal(torch.randn(2), expected)
