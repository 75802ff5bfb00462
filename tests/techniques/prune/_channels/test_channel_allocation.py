from __future__ import annotations

from collections.abc import Callable

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.macs import count_macs
from omgoptim.requests.prune import Structured
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.prune._channels.channel_allocation import (
    MacsPrediction,
    Widths,
    most_important,
    original_widths,
    round_widths,
    target_widths,
    widths_for_macs,
)
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.groups import Group, Groups, Place
from omgoptim.techniques.prune._channels.removal import remove
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def group(name: str, width: int, unit: int = 1, kind: str = "channels") -> Group:
    everything = torch.arange(width)
    return Group(name, width, unit, kind, (Place(name, "out", everything, everything),))  # type: ignore[arg-type]


def stack(*widths: int) -> tuple[nn.Module, Groups]:
    module = nn.ModuleDict({f"layer{i}": nn.Linear(2, width) for i, width in enumerate(widths)})
    return module, Groups([group(f"layer{i}", width) for i, width in enumerate(widths)])


def widths(module: nn.Module, groups: Groups, ratio: float, scores: dict[str, Tensor] | None = None, **asked: object):
    params = Structured(**asked)  # type: ignore[arg-type]
    full = {each.name: each.width for each in groups.groups}
    wanted = target_widths(module, groups, scores or {}, full, params, ratio)
    return round_widths(groups, wanted, full, params.max_layer_ratio, params.round_to)


def test_the_same_share_goes_from_every_group_and_wide_ones_stay_multiples_of_eight() -> None:
    assert widths(*stack(10, 24, 48, 100), 0.3) == {"layer0": 7, "layer1": 17, "layer2": 32, "layer3": 72}
    assert widths(*stack(10, 24, 48, 100), 0.3, round_to=1) == {"layer0": 7, "layer1": 17, "layer2": 34, "layer3": 70}
    assert widths(*stack(10, 24, 48, 100), 0.3, round_to=16) == {
        "layer0": 10,  # narrower than a step
        "layer1": 16,
        "layer2": 32,
        "layer3": 64,
    }


def test_at_least_one_unit_and_what_max_layer_ratio_leaves_stay() -> None:
    assert widths(*stack(4, 20), 0.99, max_layer_ratio=0.95) == {"layer0": 1, "layer1": 1}
    assert widths(*stack(4, 20), 0.99, max_layer_ratio=0.5) == {"layer0": 2, "layer1": 10}


def test_heads_go_whole_and_are_not_rounded_to_eight() -> None:
    module = nn.ModuleDict({"q": nn.Linear(2, 96)})
    assert widths(module, Groups([group("q", 96, 12, "heads")]), 0.3) == {"q": 72}  # 67.2, of heads of 12


def test_a_ratio_is_of_the_original_width_in_every_round() -> None:
    module, groups = stack(14)
    params = Structured()
    full = {"layer0": 20}
    for ratio, width in ((0.3, 14), (0.5, 10)):
        wanted = target_widths(module, groups, {}, full, params, ratio)
        assert round_widths(groups, wanted, full, params.max_layer_ratio) == {"layer0": width}


def test_a_global_ranking_takes_the_least_important_wherever_they_are() -> None:
    module, groups = stack(4, 4)
    scores = {"layer0": torch.tensor([0.1, 0.2, 0.3, 9.0]), "layer1": torch.tensor([1.0, 2.0, 3.0, 0.4])}
    assert widths(module, groups, 0.5, scores, ranking="global") == {"layer0": 1, "layer1": 3}
    assert widths(module, groups, 0.5, scores, ranking="global", max_layer_ratio=0.5) == {"layer0": 2, "layer1": 2}
    assert widths(module, groups, 0.5, scores, ranking="uniform") == {"layer0": 2, "layer1": 2}


def test_an_isomorphic_ranking_compares_groups_of_one_structure_only() -> None:
    module = nn.ModuleDict({"layer0": nn.Linear(2, 4), "layer1": nn.Linear(2, 4), "layer2": nn.Conv2d(2, 4, 1)})
    groups = Groups([group("layer0", 4), group("layer1", 4), group("layer2", 4)])
    scores = {
        "layer0": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "layer1": torch.tensor([5.0, 6.0, 7.0, 8.0]),
        "layer2": torch.tensor([0.01, 0.02, 0.03, 0.04]),
    }
    assert widths(module, groups, 0.5, scores, ranking="isomorphic", max_layer_ratio=0.75) == {
        "layer0": 1,
        "layer1": 3,
        "layer2": 2,
    }


def test_the_most_important_units_are_kept_and_the_first_of_equals() -> None:
    scores = {"a": torch.tensor([3.0, 1.0, 2.0, 2.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    kept = most_important(Groups([group("a", 4), group("b", 3)]), scores, {"a": 2, "b": 3})
    assert {name: keep.tolist() for name, keep in kept.items()} == {"a": [0, 2]}
    wide = Group("c", 6, 2, "channels", (), blocked=False)  # channel k of both halves
    kept = most_important(Groups([wide]), {"c": torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])}, {"c": 4})
    assert kept["c"].tolist() == [1, 2, 4, 5]


def test_a_fused_projection_counts_as_wide_as_its_heads(run_of: RunOf) -> None:
    module = nets.Vit(24, nets.FusedAttention(24, 4)).eval()
    run = run_of(module, [torch.randn(2, 3, 16, 16)])
    groups = find_groups(module, Structured(), run)
    assert original_widths(groups, module, run.original) == {"blocks.0.attention.qkv": 24, "blocks.0.fc1": 96}


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (nets.Residual, IMAGES),
        (nets.Branches, IMAGES),
        (nets.mobile, torch.randn(2, 3, 16, 16)),
        (lambda: nets.Vit(24, nets.FusedAttention(24, 4)), torch.randn(2, 3, 16, 16)),
        (lambda: nets.Vit(24, nets.SplitAttention(24, 4, 2)), torch.randn(2, 3, 16, 16)),
    ],
)
def test_operations_are_predicted_exactly(build: Callable[[], nn.Module], x: Tensor, run_of: RunOf) -> None:
    module = build().eval()
    run = run_of(module, [x])
    groups = find_groups(module, Structured(), run)
    operations = MacsPrediction(module, groups, Probe.of(run))
    narrow = {each.name: (each.width // each.unit // 2) * each.unit for each in groups.groups}
    scores = {each.name: torch.ones(each.width) for each in groups.groups}
    predicted = operations.at(narrow)
    remove(module, groups, most_important(groups, scores, narrow), run)
    assert predicted == pytest.approx(count_macs(module, (x,), {}).macs)


def test_the_widest_widths_within_some_operations_are_found(run_of: RunOf) -> None:
    module = nets.Residual(24).eval()
    run = run_of(module, [IMAGES])
    groups = find_groups(module, Structured(), run)
    operations = MacsPrediction(module, groups, Probe.of(run))
    scores = {each.name: torch.arange(each.width, dtype=torch.float32) for each in groups.groups}
    full = {each.name: each.width for each in groups.groups}

    def at(ratio: float, round_to: int | None) -> Widths:
        wanted = target_widths(module, groups, scores, full, Structured(), ratio)
        return round_widths(groups, wanted, full, Structured().max_layer_ratio, round_to)

    most = operations.current / 2
    found = widths_for_macs(groups, scores, operations, most, at, None)
    assert 0.98 * most <= operations.at(found) <= most
    with pytest.raises(TechniqueError, match="cannot be reached"):
        widths_for_macs(groups, scores, operations, operations.current / 500, at, None)
