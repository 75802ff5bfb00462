"""Candidate students, and the search for their size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import Auto, FewerLayers, LowRank, Narrow
from omgoptim.techniques.distill._student.proposals import MAX_EVALUATIONS, StudentBuilder, largest_within, proposals
from omgoptim.techniques.registry import apply_to_module


def channels(fixed: int = 0, full: int = 24) -> Callable[[float], int]:
    """Parameters of a network whose channels are whole numbers: steps."""
    return lambda x: fixed + 300 * max(1, int(full * x + 0.5)) ** 2


@pytest.mark.parametrize("fixed", [0, 10_000])
@pytest.mark.parametrize("full", [24, 500])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1])
def test_it_is_near_the_largest_within_the_goal_in_few_counts(fixed: int, full: int, share: float) -> None:
    count, counted = channels(fixed, full), []

    def counting(x: float) -> int:
        counted.append(x)
        return count(x)

    goal = fixed + share * (count(1.0) - fixed)
    x, found = largest_within(counting, goal, 0.01)
    assert x is not None
    assert found == count(x) <= goal
    best = max(count(step / 1000) for step in range(1, 1001) if count(step / 1000) <= goal)
    assert found >= 0.93 * best
    assert len(counted) <= MAX_EVALUATIONS + 1


def test_everything_is_within_a_large_goal() -> None:
    assert largest_within(channels(), 1e9, 0.01) == (1.0, 300 * 24**2)
    assert largest_within(channels(), 1e9, 0.01, high_end=0.5) == (0.5, 300 * 12**2)


def test_a_goal_below_the_minimum_gives_none_and_the_minimum() -> None:
    assert largest_within(channels(10_000), 9_000, 0.02) == (None, 10_300)


def test_a_straight_line_is_met_at_once() -> None:
    counted = []

    def count(x: float) -> int:
        counted.append(x)
        return int(1000 + 9000 * x)

    x, found = largest_within(count, 5_500, 0.02, high_end=0.9, power=1)
    assert x is not None
    assert 0.97 * 5_500 <= found <= 5_500
    assert len(counted) <= 4


@pytest.mark.parametrize("share", [0.8, 0.25, 0.05])
def test_a_count_that_falls_otherwise_than_expected_is_bracketed_all_the_same(share: float) -> None:
    """One large layer that grows with the width, little that grows with its square: false position stuck at 58x."""

    def count(x: float) -> int:
        width = max(1, int(128 * x + 0.5))
        return 3 + 432 * width + max(1, int(12 * x + 0.5)) * 9

    counted: list[float] = []

    def counting(x: float) -> int:
        counted.append(x)
        return count(x)

    goal = share * count(1.0)
    x, found = largest_within(counting, goal, 0.02)
    best = max(count(step / 1000) for step in range(20, 1001) if count(step / 1000) <= goal)
    assert x is not None
    assert found == count(x)
    assert 0.95 * best <= found <= goal
    assert len(counted) <= MAX_EVALUATIONS + 1


@pytest.mark.parametrize("cliff", [0.021, 0.3, 0.5, 0.999])
def test_a_cliff_is_found_wherever_it_is(cliff: float) -> None:
    assert largest_within(lambda x: 10 if x < cliff else 1000, 500, 0.02) == (pytest.approx(cliff - 0.001), 10)


def vit(blocks: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nets.Vit(32, *(nets.FusedAttention(32, 4) for _ in range(blocks))).eval()


class Heard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def test_every_student_of_a_convolutional_teacher_is_within_the_target_and_near_it(
    run_of: Any, drawn: Any, resnet: Any
) -> None:
    teacher = resnet(24)
    goal = count_params(teacher)[0] / 20
    x = drawn(32, 1, 12, 12)
    found, passed_over = proposals(copy.deepcopy(teacher), Auto(target_compression=20), run_of(teacher, x), 20)
    assert {each.params.student for each in found} == {"narrow", "depthwise", "inverted_residual"}
    assert passed_over == []
    for each in found:
        assert 0.9 * goal < each.params_count == count_params(each.module)[0] <= goal
        assert each.module(x).shape == (32, 10)
        assert each.outcome.changed
    macs = [each.macs for each in found]
    assert macs == sorted(macs, reverse=True)
    assert macs[0] == count_macs(found[0].module, (x,), {}).macs


def test_a_student_is_the_one_that_its_params_derive(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(8)
    run = run_of(teacher, drawn(32, 1, 12, 12))
    found, _ = proposals(copy.deepcopy(teacher), Auto(target_compression=6), run, 6)
    for each in found:
        student = copy.deepcopy(teacher)
        outcome = apply_to_module(student, each.params, run)
        state = student.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in each.module.state_dict().items())
        assert outcome.changed == each.outcome.changed


def test_a_transformer_gets_shorter_narrower_and_of_low_rank(run_of: Any, drawn: Any) -> None:
    teacher = vit()
    found, _ = proposals(copy.deepcopy(teacher), Auto(target_compression=3), run_of(teacher, drawn(4, 3, 16, 16)), 3)
    assert {each.params.student for each in found} == {"narrow", "fewer_layers", "low_rank"}
    assert any(isinstance(each.params, Narrow) and each.params.depth < 1 for each in found)
    assert all(3 * each.params_count <= count_params(teacher)[0] for each in found)


def test_with_layers_to_keep_every_student_keeps_them(run_of: Any, drawn: Any) -> None:
    teacher = vit()
    auto = Auto(keep_layers=2)
    found, _ = proposals(copy.deepcopy(teacher), auto, run_of(teacher, drawn(4, 3, 16, 16)), auto.compression)
    assert all(len(each.module.blocks) == 2 for each in found)
    widths = {each.params.width for each in found if isinstance(each.params, FewerLayers)}
    assert widths == {1.0, 0.75}
    assert any(isinstance(each.params, LowRank) for each in found)


def test_with_layers_to_keep_and_a_target_they_are_narrowed_to_it(run_of: Any, drawn: Any) -> None:
    teacher = vit()
    auto = Auto(keep_layers=2, target_compression=4)
    found, _ = proposals(copy.deepcopy(teacher), auto, run_of(teacher, drawn(4, 3, 16, 16)), auto.compression)
    assert found
    assert all(len(each.module.blocks) == 2 for each in found)
    assert all(4 * each.params_count <= count_params(teacher)[0] for each in found)


def test_a_recurrent_teacher_gets_narrower(run_of: Any, drawn: Any) -> None:
    torch.manual_seed(0)
    teacher = Heard().eval()
    (only,), _ = proposals(copy.deepcopy(teacher), Auto(), run_of(teacher, drawn(8, 6, 3)), 10)
    assert only.params.student == "narrow"
    assert 10 * only.params_count <= count_params(teacher)[0]


def test_a_method_above_the_budget_is_reported_with_its_smallest_student(run_of: Any, drawn: Any) -> None:
    teacher = vit()
    run = run_of(teacher, drawn(4, 3, 16, 16))
    found, passed_over = proposals(copy.deepcopy(teacher), Auto(target_compression=100), run, 100)
    assert found == []
    reasons = dict(passed_over)
    assert set(reasons) == {"narrow", "narrow with fewer layers", "fewer layers", "low rank", "low rank, narrower"}
    assert "parameters, more than the target" in reasons["narrow"]


def test_for_a_speedup_alone_several_sizes_are_tried(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(16)
    auto = Auto(target_speedup=2)
    found, _ = proposals(copy.deepcopy(teacher), auto, run_of(teacher, drawn(32, 1, 12, 12)), auto.compression)
    narrow = [count_params(teacher)[0] / each.params_count for each in found if isinstance(each.params, Narrow)]
    assert len(narrow) == 2
    assert min(narrow) >= 4
    assert max(narrow) >= 8


def test_only_so_many_candidates_and_none_twice(run_of: Any, drawn: Any) -> None:
    teacher = vit()
    run = run_of(teacher, drawn(4, 3, 16, 16))
    found, _ = proposals(copy.deepcopy(teacher), Auto(target_compression=3, candidates=2), run, 3)
    assert len(found) == 2
    shapes = [tuple((name, tensor.shape) for name, tensor in each.module.state_dict().items()) for each in found]
    assert len(set(shapes)) == 2


def test_keep_layers_for_a_teacher_without_repeats_is_reported(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(8)
    found, ((name, why),) = proposals(teacher, Auto(keep_layers=2), run_of(teacher, drawn(4, 1, 12, 12)), None)
    assert found == []
    assert name == "keep_layers"
    assert "no layer repeats" in why


def test_what_is_ignored_stays_in_every_student(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(16)
    auto = Auto(target_compression=3, ignore=["stages.0"])
    found, _ = proposals(copy.deepcopy(teacher), auto, run_of(teacher, drawn(32, 1, 12, 12)), 3)
    assert found
    for each in found:
        assert type(each.module.stages[0][0].conv1) is nn.Conv2d
        assert each.module.stages[0][0].conv1.out_channels == 16
    with pytest.raises(TechniqueError, match="matches no layer"):
        proposals(teacher, Auto(ignore=["nowhere"]), run_of(teacher, drawn(4, 1, 12, 12)), 4)


def test_what_is_slow_to_find_is_found_once(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(8)
    builder = StudentBuilder(teacher, Auto(), run_of(teacher, drawn(8, 1, 12, 12)))
    small, _ = builder.build(Narrow(width=0.5), fit=False)
    (base,) = builder._bases.values()
    narrowing = base.narrowing
    large, _ = builder.build(Narrow(width=0.75), fit=True)
    assert narrowing is base.narrowing is not None
    assert count_params(small)[0] < count_params(large)[0] < builder.params == count_params(teacher)[0]
