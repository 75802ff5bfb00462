"""Layer selection by globs, and repeated layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.models.child_removal import keep_children
from omgoptim.requests.distill import Narrow
from omgoptim.techniques.distill._student.layer_selection import (
    LayerSelection,
    Stack,
    drop_layers,
    find_stacks,
    paths_of,
)
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
ALL = LayerSelection([], [])


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), nn.Linear(2, 2))


def test_globs_follow_the_layers_that_they_named_to_their_new_numbers() -> None:
    module = stack()
    selection = LayerSelection.of(module, Narrow(targets=["1.[13]", "2"], ignore=["1.3"]))
    before = paths_of(module)
    assert [path for path in ("0", "1.1", "1.2", "1.3", "2") if selection.includes(path)] == ["1.1", "2"]
    keep_children(module, "1", [0, 1, 3])
    after = selection.after(before, module)
    assert [path for path in ("0", "1.0", "1.1", "1.2", "2") if after.includes(path)] == ["1.1", "2"]


def test_targets_that_are_all_gone_name_nothing_instead_of_everything() -> None:
    module = stack()
    selection, before = LayerSelection.of(module, Narrow(targets=["1.3"])), paths_of(module)
    keep_children(module, "1", [0])
    after = selection.after(before, module)
    assert after.nothing
    assert not after.includes("0")


def test_what_was_not_named_stays_not_named_and_everything_stays_everything() -> None:
    module = stack()
    everything, before = LayerSelection.of(module, Narrow()), paths_of(module)
    keep_children(module, "1", [0, 3])
    assert everything.after(before, module) == LayerSelection([], [])


def test_a_glob_that_names_no_layer_is_refused() -> None:
    with pytest.raises(TechniqueError, match="'3' matches no layer"):
        LayerSelection.of(stack(), Narrow(ignore=["3"]))


class SideBySide(nn.Module):
    """Convolutions and their norms in two lists, run in turn; a third list of as many, run afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(3, 4, 3, padding=1), *(nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))])
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(4))
        self.after = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        for conv in self.after:
            x = conv(x)
        return x


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def conv_norm_relu(count: int, width: int = 4) -> list[nn.Module]:
    return [
        layer
        for _ in range(count)
        for layer in (nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    ]


@pytest.mark.parametrize(
    ("count", "keep", "stay"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),  # as DistilBERT
        (6, 3, [0, 3, 5]),
        (6, 2, [0, 5]),
        (6, 1, [0]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_layers_that_stay_are_spread_evenly_with_the_first_and_the_last(count: int, keep: int, stay: list[int]) -> None:
    assert Stack(("layers",), tuple((index,) for index in range(count))).spread(keep) == stay


def test_a_transformers_layers_are_a_stack(run_of: RunOf, drawn: Any) -> None:
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    assert find_stacks(module, ALL, run_of(module, drawn(2, 5, 8))) == [Stack(("layers",), ((0,), (1,), (2,)))]


def test_neighbours_that_come_again_and_again_are_one_unit(run_of: RunOf, drawn: Any) -> None:
    module = chain(nn.Conv2d(3, 4, 1), *conv_norm_relu(3), nn.Conv2d(4, 2, 1))
    (stack,) = find_stacks(module, ALL, run_of(module, drawn(2, 3, 6, 6)))
    assert stack == Stack(("",), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    whole = copy.deepcopy(module)
    (change,) = drop_layers(module, [stack], {stack: 2})
    assert (change.before, change.after) == ("11", "8: 0, 1, 2, 3, 7, 8, 9, 10")
    x = drawn(2, 3, 6, 6)
    kept = [whole[index] for index in (0, 1, 2, 3, 7, 8, 9, 10)]
    torch.testing.assert_close(module(x), nn.Sequential(*kept)(x))


def test_lists_that_run_side_by_side_lose_the_same_places_and_others_go_alone(run_of: RunOf, drawn: Any) -> None:
    module = SideBySide()
    x = drawn(2, 3, 6)
    stacks = find_stacks(module, ALL, run_of(module, x))
    together, alone = Stack(("convs", "norms"), ((1,), (2,), (3,))), Stack(("after",), ((0,), (1,), (2,), (3,)))
    assert stacks == [together, alone]
    changes = drop_layers(module, stacks, {together: 1, alone: 3})
    assert [change.path for change in changes] == ["after", "convs", "norms"]
    assert [len(module.convs), len(module.norms), len(module.after)] == [2, 2, 3]
    assert module(x).shape == (2, 4, 6)


def test_only_layers_alike_that_give_the_shape_that_they_get_can_go(run_of: RunOf, drawn: Any, resnet: Any) -> None:
    x = drawn(2, 1, 12, 12)
    module = resnet(blocks=(1, 3, 2))
    stacks = find_stacks(module, ALL, run_of(module, x))
    assert stacks == [Stack(("stages.1",), ((1,), (2,)))]
    for flat in (
        chain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)),
        chain(nn.ReLU(), nn.ReLU(), nn.Linear(4, 4)),  # without weights there is nothing to save
        chain(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)),
    ):
        rows = drawn(2, 4, 9) if isinstance(flat[0], nn.Conv1d) else drawn(2, 4)
        assert find_stacks(flat, ALL, run_of(flat, rows)) == []


def test_a_layer_that_is_not_called_or_stands_in_two_places_does_not_repeat(run_of: RunOf, drawn: Any) -> None:
    shared = nn.Linear(4, 4)
    tied = chain(shared, shared, shared)
    assert find_stacks(tied, ALL, run_of(tied, drawn(2, 4))) == []

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    half = Half()
    assert find_stacks(half, ALL, run_of(half, drawn(2, 4))) == [Stack(("layers",), ((0,), (1,)))]


def test_of_stacks_in_stacks_the_outer_layers_go(run_of: RunOf, drawn: Any) -> None:
    module = chain(*(chain(*(nn.Linear(4, 4) for _ in range(2))) for _ in range(3)), chain(nn.Linear(4, 4)))
    stacks = find_stacks(module, ALL, run_of(module, drawn(2, 4)))
    assert stacks == [Stack(("",), ((0,), (1,), (2,)))]


def test_inner_stacks_go_by_their_old_paths_when_outer_layers_go_too(run_of: RunOf, drawn: Any) -> None:
    inner = chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    module = chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh(), inner)
    stacks = find_stacks(module, ALL, run_of(module, drawn(2, 4)))
    assert [stack.paths for stack in stacks] == [("",), ("4",)]
    drop_layers(module, stacks, dict.fromkeys(stacks, 1))
    assert module[2] is inner
    assert len(inner) == 2


def test_layers_that_targets_or_ignore_leave_alone_stay(run_of: RunOf, drawn: Any) -> None:
    module = nets.Vit(8, *(nets.FusedAttention(8, 2) for _ in range(4)))
    run = run_of(module, drawn(2, 3, 16, 16))
    ignoring = find_stacks(module, LayerSelection([], ["blocks.0"]), run)
    assert ignoring == [Stack(("blocks",), ((1,), (2,), (3,)))]
    assert find_stacks(module, LayerSelection(["blocks.3"], []), run) == []
