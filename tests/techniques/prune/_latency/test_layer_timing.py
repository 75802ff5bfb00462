"""Width grids, and times of layers by width."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.models.samples import Samples
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.prune._channels.groups import Group, Place
from omgoptim.techniques.prune._latency import layer_timing as layer_times
from omgoptim.techniques.prune._latency.knapsack import choose_widths
from omgoptim.techniques.prune._latency.latency_table import Side, full_ms, predicted_ms
from omgoptim.techniques.prune._latency.layer_benchmark import SizedLayer, Times
from omgoptim.techniques.prune._latency.layer_timing import (
    evenly_spread,
    measure_layer_times,
    side_of,
    sizes_of,
    widths_of,
)
from omgoptim.techniques.registry import ModuleRun


def group(width: int, unit: int = 1, name: str = "g") -> Group:
    return Group(name, width, unit, "channels", ())


def place_on_input(width: int, features: int = 1) -> Place:
    roots = torch.arange(width).repeat_interleave(features)
    return Place("layer", "in", torch.arange(width * features), roots)


def test_widths_are_multiples_and_the_full_one_is_the_last() -> None:
    assert widths_of(group(60), 20, round_to=8) == (8, 16, 24, 32, 40, 48, 56, 60)
    assert widths_of(group(60, unit=12), 20, round_to=8) == (24, 48, 60)


def test_no_width_is_below_a_tenth() -> None:
    assert widths_of(group(100), 100, round_to=1)[0] == 10


def test_only_so_many_widths_evenly() -> None:
    assert widths_of(group(256), 5, round_to=16) == (32, 96, 144, 192, 256)


def test_a_group_too_narrow_for_the_rounding_goes_by_its_unit() -> None:
    assert widths_of(group(6), 8, round_to=8) == (1, 2, 3, 4, 5, 6)
    assert widths_of(group(6, unit=2), 8, round_to=8) == (2, 4, 6)


def test_a_group_of_one_unit_has_its_full_width_alone() -> None:
    assert widths_of(group(4, unit=4), 8) == (4,)


def test_spread_keeps_both_ends() -> None:
    assert evenly_spread(range(10), 4) == (0, 3, 6, 9)
    assert evenly_spread((1, 2), 4) == (1, 2)


def test_a_side_is_made_of_its_groups_and_what_is_fixed() -> None:
    a, b = group(16, name="a"), group(8, name="b")
    assert side_of(16, [(a, place_on_input(16))]) == Side(0, (("a", 1),))
    assert side_of(16 * 49, [(a, place_on_input(16, 49))]) == Side(0, (("a", 49),))
    assert side_of(30, [(a, place_on_input(16)), (b, place_on_input(8))]) == Side(6, (("a", 1), ("b", 1)))
    assert side_of(32, [(a, place_on_input(16)), (a, place_on_input(16))]) == Side(0, (("a", 2),))
    assert side_of(10, []) == Side(10)


def test_sizes_of_a_side_follow_all_of_its_groups() -> None:
    candidates, full = {"a": (4, 8, 16), "b": (8, 16)}, {"a": 16, "b": 16}
    assert sizes_of(Side(3), candidates, full, 8) == (3,)
    assert sizes_of(Side(0, (("a", 3),)), candidates, full, 8) == (12, 24, 48)
    assert sizes_of(Side(1, (("a", 1), ("b", 1))), candidates, full, 8) == (13, 17, 33)
    assert sizes_of(Side(0, (("a", 1),)), candidates, full, 2) == (4, 16)


class Small(nn.Module):
    """A convolution, a depthwise one, a Linear behind a flattened map that is called twice, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.hidden = nn.Linear(8 * 16, 16)
        self.head = nn.Linear(16, 3)
        self.unused = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.depthwise(self.norm(self.stem(x)).relu()).flatten(1)
        return self.head(self.hidden(maps).relu() + self.hidden(-maps))


def place(path: str, side: str, width: int, features: int = 1) -> Place:
    roots = torch.arange(width).repeat_interleave(features)
    return Place(path, "in" if side == "in" else "out", torch.arange(width * features), roots)


STEM = Group(
    "stem",
    8,
    1,
    "channels",
    (place("stem", "out", 8), place("norm", "out", 8), place("depthwise", "out", 8), place("hidden", "in", 8, 16)),
)
HIDDEN = Group("hidden", 16, 1, "channels", (place("hidden", "out", 16), place("head", "in", 16)))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def run_on(runtime: str, module: nn.Module, scratch: Path) -> ModuleRun:
    signature = Signature((InputTensor("x", "float32", ("batch", 1, 4, 4), False),), "tensor")
    batch = np.random.default_rng(0).standard_normal((4, 1, 4, 4), dtype=np.float32)
    return ModuleRun(
        signature, Samples([{"x": batch}], [None]), lambda out, _: out.sum(), module, scratch, runtime=runtime
    )


@pytest.mark.parametrize("runtime", ["torch_eager", "onnxruntime", "openvino"])
def test_every_layer_has_a_time_at_every_width(runtime: str, module: nn.Module, tmp_path: Path) -> None:
    table = measure_layer_times(module, [STEM, HIDDEN], run_on(runtime, module, tmp_path), 3, round_to=4, budget_s=1.0)
    assert table.candidates == {"stem": (4, 8), "hidden": (4, 12, 16)}
    layers = {layer.path: layer for layer in table.layers}
    assert {path: (layer.ins, layer.outs) for path, layer in layers.items()} == {
        "stem": ((1,), (4, 8)),
        "depthwise": ((8,), (4, 8)),
        "hidden": ((64, 128), (4, 12, 16)),
        "head": ((4, 12, 16), (3,)),
    }
    times = [ms for layer in table.layers for row in layer.ms for ms in row]
    assert all(math.isfinite(ms) and ms > 0 for ms in times)
    assert table.unmeasured == ()
    assert list(tmp_path.iterdir()) == []
    widths = choose_widths(table, {"stem": torch.ones(8), "hidden": torch.ones(16)}, 1.0)
    assert predicted_ms(table, widths) <= full_ms(table)


def test_torch_compile_is_predicted_by_the_times_of_torch_eager(module: nn.Module, tmp_path: Path) -> None:
    table = measure_layer_times(module, [HIDDEN], run_on("torch_compile", module, tmp_path), 2, budget_s=0.2)
    assert table.runtime == "torch_eager"


def test_measuring_leaves_the_module_and_torch_as_they_were(module: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train()
    threads = torch.get_num_threads()
    measure_layer_times(module, [STEM], run_on("torch_eager", module, tmp_path), 2, budget_s=0.2)
    assert module.training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_layer_that_is_called_twice_costs_twice(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_ms(points: list[SizedLayer], *_: object) -> dict[object, float]:
        return {point.key: 1.0 for point in points}

    monkeypatch.setattr(layer_times, "time_points", one_ms)
    table = measure_layer_times(module, [STEM, HIDDEN], run_on("torch_eager", module, tmp_path), 3, budget_s=1.0)
    assert {layer.path: layer.ms[-1][-1] for layer in table.layers} == pytest.approx(
        {"stem": 1, "depthwise": 1, "hidden": 2, "head": 1}
    )


def test_a_member_that_is_never_called_is_listed_as_unmeasured(module: nn.Module, tmp_path: Path) -> None:
    hidden = Group("hidden", 16, 1, "channels", (*HIDDEN.places, place("unused", "in", 16)))
    table = measure_layer_times(module, [hidden], run_on("torch_eager", module, tmp_path), 2, budget_s=0.2)
    assert table.unmeasured == ("unused",)


def test_groups_without_a_layer_that_can_be_timed_are_an_error(module: nn.Module, tmp_path: Path) -> None:
    lost = Group("unused", 3, 1, "channels", (place("unused", "out", 3),))
    with pytest.raises(TechniqueError, match="no prunable layer"):
        measure_layer_times(module, [lost], run_on("torch_eager", module, tmp_path), 2, budget_s=0.2)


def test_little_time_means_fewer_widths_but_all_layers(module: nn.Module, tmp_path: Path) -> None:
    wide = Group("hidden", 16, 1, "channels", HIDDEN.places)
    table = measure_layer_times(module, [wide], run_on("torch_eager", module, tmp_path), 16, round_to=1, budget_s=1e-6)
    assert [len(layer.outs) for layer in table.layers if layer.path == "hidden"] == [layer_times.MIN_WIDTHS]
    assert len(table.candidates["hidden"]) == 15


def test_visits_that_disagree_and_falls_are_in_doubt() -> None:
    layer = nn.Linear(4, 16)
    points = [SizedLayer(layer, (1, 4), 4, out) for out in (4, 8, 12, 16)]
    times = Times({p.key: ms for p, ms in zip(points, ([1.0, 1.01], [3.0, 3.0], [2.0, 2.0], [4.0, 5.0]), strict=True)})
    assert times.relative_gap(points[3]) == pytest.approx(0.25)
    member = layer_times._Member("l", layer, layer_times.Counter([(1, 4)]), STEM_IN, HIDDEN_OUT, (4,), (4, 8, 12, 16))
    assert {point.out_size for point in layer_times._unreliable_points([member], times)} == {8, 16}


STEM_IN, HIDDEN_OUT = layer_times.Side(4), layer_times.Side(0, (("hidden", 1),))
