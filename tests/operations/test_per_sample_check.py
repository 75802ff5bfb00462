from __future__ import annotations

import copy

import pytest
import torch
from small_training import signature_of
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.models.samples import Samples
from omgoptim.operations.per_sample_check import refuse_partial


class Branching(nn.Module):
    """Two layers, the second of which only negative inputs take."""

    def __init__(self, width: int = 4, other: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, width), nn.Linear(other, other), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(self.second(h) if x.sum() < 0 else h)


def samples(signs: list[int]) -> Samples:
    return Samples([{"x": torch.full((1, 3), float(sign)).numpy()} for sign in signs], [None] * len(signs))


def test_a_module_that_fails_on_some_samples_is_refused_with_their_number() -> None:
    original, smaller = Branching().eval(), Branching(width=3).eval()
    signature = signature_of(original, torch.ones(2, 3))
    with pytest.raises(TechniqueError, match="fails on 2 of 5 samples") as error:
        refuse_partial(smaller, original, samples([1, -1, 1, -1, 1]), signature)
    assert "self.second(h)" in error.value.why
    assert refuse_partial(smaller, original, samples([1, 1]), signature) == 2


def test_a_module_of_the_same_shapes_is_not_run() -> None:
    original = Branching().eval()
    assert (
        refuse_partial(copy.deepcopy(original), original, samples([1]), signature_of(original, torch.ones(2, 3))) == 0
    )


def test_samples_that_the_original_does_not_take_either_do_not_count() -> None:
    original, smaller = Branching(other=5).eval(), Branching(width=3, other=5).eval()
    signature = signature_of(original, torch.ones(2, 3))
    assert refuse_partial(smaller, original, samples([-1, 1]), signature) == 2


def test_outputs_of_another_shape_are_refused() -> None:
    original, other = nn.Sequential(nn.Linear(3, 2)).eval(), nn.Sequential(nn.Linear(3, 4)).eval()
    signature = signature_of(original, torch.ones(2, 3))
    name = signature.input_names[0]
    one = Samples([{name: torch.ones(2, 3).numpy()}], [None])
    with pytest.raises(TechniqueError, match="fails on 2 of 2") as error:
        refuse_partial(other, original, one, signature)
    assert "[(1, 4)] instead of [(1, 2)]" in error.value.why
