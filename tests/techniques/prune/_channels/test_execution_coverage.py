from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.dependency_graph import coverage, covering, find_groups
from omgoptim.techniques.registry import apply_to_module


class Switched(nn.Module):
    """A stem that one of two layers reads, by the sign of the input's mean, and a tail that always runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positive, self.negative = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.wide, self.out = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        h = self.positive(h) if x.mean() > 0 else self.negative(h)
        return self.out(self.wide(h).relu())


def rows(*signs: int) -> Tensor:
    """One row for each sign: all ones, scaled a little apart."""
    return torch.stack([torch.full((4,), sign * (1 + index / 10)) for index, sign in enumerate(signs)])


def switched() -> nn.Module:
    torch.manual_seed(0)
    return Switched().eval()


def test_coverage_counts_for_how_many_samples_each_layer_ran(run_of: Any) -> None:
    model = switched()
    known = coverage(model, run_of(model, [rows(1, 1, -1)]))
    assert (known.samples, known.runs["positive"], known.runs["negative"], known.runs["out"]) == (3, 2, 1, 3)
    assert len(known.ways) == 2
    assert set(known.partial()) == {"positive", "negative"}


def test_a_model_without_branches_has_one_way_and_nothing_partial(run_of: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    probe, known = covering(model, run_of(model, [rows(1, -1)]))
    assert (known.partial(), known.ways, probe.others) == ({}, [], ())


def test_layers_of_a_branch_stay_and_the_rest_is_pruned_for_both_ways(run_of: Any) -> None:
    model = switched()
    run = run_of(model, [rows(1, 1, -1, 1)])  # the first two, on which channels are traced, take the same way
    outcome = apply_to_module(model, Structured(pruning_ratio=0.5, reconstruct=False), run)
    assert {change.path for change in outcome.changed} == {"wide", "out"}
    reasons = {skip.path: skip.reason for skip in outcome.skipped}
    assert "runs only for some inputs (3 of 4 samples)" in reasons["stem"]
    assert "runs only for some inputs (1 of 4 samples)" in reasons["negative"]
    for x in (rows(1), rows(-1)):
        assert model(x).shape == (1, 3)


def test_a_layer_that_never_ran_keeps_all_groups_of_its_width_whole(run_of: Any) -> None:
    model = switched()
    groups = find_groups(model, Structured(), run_of(model, [rows(1, 1, 1, 1)]))
    assert [group.name for group in groups.groups] == ["wide"]
    reasons = {skip.path: skip.reason for skip in groups.skipped}
    assert "negative may read or write its channels, and it ran for none of 4 samples" in reasons["stem"]
    assert "ran for none" in reasons["negative"]


def test_a_branch_without_layers_that_fixes_the_width_is_proven_against(run_of: Any) -> None:
    class Fixed(nn.Module):
        """Reads its hidden width as a number, through a layer of its own, on one way only."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.scale, self.out = nn.Linear(4, 10), nn.PReLU(1), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.hidden(x)
            if x.mean() < 0:
                h = self.scale(h).view(-1, 5, 2).flatten(1)
            return self.out(h)

    model = Fixed().eval()
    with pytest.raises(TechniqueError, match="remove nothing") as error:
        apply_to_module(model, Structured(pruning_ratio=0.1, reconstruct=False), run_of(model, [rows(1, 1, -1)]))
    assert "hidden" in error.value.why
