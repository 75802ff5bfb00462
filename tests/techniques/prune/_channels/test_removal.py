from __future__ import annotations

import copy
from collections.abc import Callable

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.reports import Change
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.groups import Group, Groups, Place
from omgoptim.techniques.prune._channels.removal import remove, remove_with_positions
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def channels(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop)


def test_the_smaller_net_gives_what_one_cut_by_hand_gives(run_of: RunOf) -> None:
    torch.manual_seed(0)
    module = nets.Residual(4).eval()
    hand = nets.Residual(4).eval()
    keep, inner = torch.tensor([1, 3]), torch.tensor([0, 5, 6])
    hand.stem.weight = nn.Parameter(module.stem.weight[keep].detach())
    hand.bn = nn.BatchNorm2d(2).eval()
    hand.conv1.weight = nn.Parameter(module.conv1.weight[inner][:, keep].detach())
    hand.conv1.bias = nn.Parameter(module.conv1.bias[inner].detach())
    hand.conv2.weight = nn.Parameter(module.conv2.weight[keep][:, inner].detach())
    hand.conv2.bias = nn.Parameter(module.conv2.bias[keep].detach())
    hand.head.weight = nn.Parameter(module.head.weight[:, keep].detach())
    hand.head.bias = module.head.bias
    run = run_of(module, [IMAGES])
    outcome = remove(module, find_groups(module, Structured(), run), {"stem": keep, "conv1": inner}, run)
    assert torch.equal(module(IMAGES), hand(IMAGES))
    assert outcome.changed == [
        Change(path="stem", what="channels", before="4", after="2"),
        Change(path="bn", what="channels", before="4", after="2"),
        Change(path="conv1", what="channels", before="8", after="3"),
        Change(path="conv1", what="input channels", before="4", after="2", indirect=True),
        Change(path="conv2", what="channels", before="4", after="2"),
        Change(path="conv2", what="input channels", before="8", after="3", indirect=True),
        Change(path="head", what="input channels", before="4", after="2", indirect=True),
    ]


def test_both_parts_of_a_concatenation_shrink_and_the_right_columns_go(run_of: RunOf) -> None:
    torch.manual_seed(0)
    module = nets.Branches().eval()
    columns = torch.tensor([2, 5, 7, 8 + 0, 8 + 4])  # of what reads the two
    expected_weight = module.joined.weight[:, columns].clone()
    run = run_of(module, [IMAGES])
    groups = find_groups(module, Structured(), run)
    keep = {"left": torch.tensor([2, 5, 7]), "right": torch.tensor([0, 4])}
    outcome = remove(module, groups, keep, run)
    assert torch.equal(module.joined.weight, expected_weight)
    joined = next(change for change in outcome.changed if change.path == "joined")
    assert (joined.what, joined.before, joined.after) == ("input channels", "14", "5")


def test_every_kind_of_group_can_be_cut_in_one_module(run_of: RunOf) -> None:
    module = nets.Branches().eval()
    run = run_of(module, [IMAGES])
    groups = find_groups(module, Structured(), run)
    keep = {group.name: group.units()[::2].flatten().sort().values for group in groups.groups}
    outcome, left = remove_with_positions(module, groups, keep, run)
    assert outcome.skipped == groups.skipped
    assert (module.many.num_channels, module.many.num_groups) == (8, 4)  # whole groups
    assert (module.few.num_channels, module.few.num_groups) == (4, 2)  # half of each
    assert (module.grouped.in_channels, module.grouped.out_channels, module.grouped.groups) == (4, 8, 4)
    assert left["joined", "out"].tolist() == [0, 2, 4, 6]
    assert module(IMAGES).shape == (3, 3)


def test_a_group_that_fails_is_put_back_and_the_others_go_on(run_of: RunOf) -> None:
    module = nets.HardCoded().eval()
    run = run_of(module, [IMAGES])
    everything = channels(0, 8)
    by_hand = Group(  # as torch-pruning sees it: nothing tells it of the number in the code
        "second",
        8,
        1,
        "channels",
        (
            Place("second", "out", everything, everything),
            Place("out", "in", channels(0, 512), everything.repeat_interleave(64)),
        ),
    )
    first = find_groups(module, Structured(), run).groups[0]
    before = copy.deepcopy(module.state_dict())
    outcome = remove(module, Groups([by_hand, first]), {"second": channels(0, 6), "first": channels(0, 5)}, run)
    assert [skip.path for skip in outcome.skipped] == ["second"]
    assert "x.view(-1, 512)" in outcome.skipped[0].reason
    assert module.second.out_channels == 8
    assert torch.equal(module.out.weight, before["out.weight"])
    assert module.first.out_channels == 5


def test_when_every_removal_fails_the_error_has_the_first_reason_and_a_fix(run_of: RunOf) -> None:
    module = nets.HardCoded().eval()
    run = run_of(module, [IMAGES])
    everything = channels(0, 8)
    place = Place("second", "out", everything, everything)
    group = Group("second", 8, 1, "channels", (place,))
    with pytest.raises(TechniqueError, match="no channel could be removed") as refused:
        remove(module, Groups([group]), {"second": channels(0, 6)}, run)
    assert "x.view(-1, 512)" in refused.value.why
    assert "x.flatten(1)" in refused.value.fix


def test_a_map_that_names_the_wrong_columns_is_found_out_though_every_shape_fits(run_of: RunOf) -> None:
    torch.manual_seed(0)
    module = nets.Residual().eval()
    run = run_of(module, [IMAGES])
    everything = channels(0, 16)
    wrong = Group(
        "conv1",
        16,
        1,
        "channels",
        (Place("conv1", "out", everything, everything), Place("conv2", "in", everything, everything.flip(0))),
    )
    with pytest.raises(TechniqueError) as refused:
        remove(module, Groups([wrong]), {"conv1": channels(0, 12)}, run)
    assert "mixes channels" in refused.value.why
    assert module.conv1.out_channels == 16


def test_ties_and_frozen_parameters_are_what_they_were(run_of: RunOf) -> None:
    module = nets.Residual().eval()
    module.head.bias.requires_grad_(False)
    module.extra = module.conv1  # the same layer under a second name
    run = run_of(module, [IMAGES])
    remove(module, find_groups(module, Structured(), run), {"stem": channels(0, 4)}, run)
    assert module.extra is module.conv1
    assert not module.head.bias.requires_grad
    assert module.head.weight.requires_grad


class Joined(nn.Module):
    """`narrow` stays at four channels, `left` and `right` write one sum, `out` the model's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.left = nn.Linear(6, 4), nn.Linear(4, 16)
        self.middle, self.right, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.narrow(x).relu()).relu()
        logits: Tensor = self.out(y + self.right(self.middle(y).relu()))
        return logits


@pytest.mark.parametrize(("asked", "stay"), [("middle", {"narrow", "left", "right", "out"}), ("left", {"middle"})])
def test_every_layer_whose_own_channels_stay_is_skipped_with_its_reason(
    asked: str, stay: set[str], run_of: RunOf
) -> None:
    torch.manual_seed(0)
    module = Joined().eval()
    run = run_of(module, [torch.randn(4, 6)])
    groups = find_groups(module, Structured(), run)
    outcome = remove(module, groups, {asked: channels(0, 3)}, run)
    shrunk = {change.path for change in outcome.changed if change.what == "channels"}
    skipped = {skip.path: skip.reason for skip in outcome.skipped}
    assert stay <= skipped.keys()
    assert not shrunk & skipped.keys()
    assert shrunk | skipped.keys() == {"narrow", "left", "middle", "right", "out"}
    assert all(skipped.values())
