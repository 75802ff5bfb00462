from __future__ import annotations

from typing import Any

import pytest
import torch
from small_training import blobs, evaluator_of, net, same, state
from torch import nn

from omgoptim.errors import DataError, UserCodeError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.samples import Samples
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.training.evaluator import COLLAPSED, Evaluator

X, Y = blobs(30)


def test_the_original_has_its_own_accuracy_and_agrees_with_itself() -> None:
    module = net()
    by_hand = float((module(X).argmax(1) == Y).float().mean())
    evaluator = evaluator_of(module, X, Y)
    assert evaluator.original == pytest.approx(by_hand)
    assert evaluator.score(module) == evaluator.original
    assert evaluator_of(module, X, None).score(module) == 1.0


def test_a_module_is_left_as_it_was() -> None:
    module = net()
    evaluator = evaluator_of(module, X, Y)
    module.drop.train()
    module.norm.train()
    modes, before = [layer.training for layer in module.modules()], state(module)
    assert evaluator.score(module) == evaluator.score(module)  # dropout is off
    assert [layer.training for layer in module.modules()] == modes
    assert same(state(module), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_a_collapse_not_an_error(value: float) -> None:
    module = net()
    evaluator, agreement = evaluator_of(module, X, Y), evaluator_of(module, X, None, "cosine")
    with torch.no_grad():
        module.out.bias[0] = value
    assert evaluator.score(module) == agreement.score(module) == COLLAPSED
    assert evaluator.original > COLLAPSED


def test_values_masked_in_the_original_too_are_no_collapse() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, torch.full((len(x), 1), -torch.inf)], 1)

    evaluator = evaluator_of(Masked(), X, None)
    assert evaluator.score(Masked()) == 1.0


def test_a_metric_of_the_user_that_is_no_number_is_a_collapse() -> None:
    value = 0.5
    evaluator = evaluator_of(net(), X, Y, lambda outputs, targets: value)
    value = float("nan")
    assert (evaluator.original, evaluator.score(net())) == (0.5, COLLAPSED)


def test_a_module_that_fails_is_said() -> None:
    evaluator = evaluator_of(net(), X, Y)

    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            raise RuntimeError("shape mismatch")

    with pytest.raises(UserCodeError, match="selection samples"):
        evaluator.score(Failing())


def test_no_samples_are_refused(policy: PathPolicy) -> None:
    evaluator = evaluator_of(net(), X, Y)
    with pytest.raises(DataError, match="no samples"):
        Evaluator.of(net(), Samples([], []), evaluator.signature, RequestedFunction("auto", policy, 60.0))
