"""Replacement of convolutions by blocks, and the blocks' closed-form fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from omgoptim.blocks import DepthSeparableConv, InvertedResidual
from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.techniques.distill._student.block_replacement import BlockNames, MakeBlock, replace_convolutions
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
ALL, WORDS = LayerSelection([], []), BlockNames("block", "a block")
BLOCKS: list[MakeBlock] = [DepthSeparableConv.from_conv, InvertedResidual.from_conv]


def apart(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        given = teacher(x)
        return float((student(x) - given).norm() / given.norm())


@pytest.mark.parametrize("make", BLOCKS, ids=["separable", "inverted"])
@pytest.mark.parametrize("bias", [True, False])
def test_fitted_blocks_are_nearer_to_the_convolutions(make: MakeBlock, bias: bool, run_of: RunOf, drawn: Any) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.Conv2d(8, 8, 3, padding=1, bias=bias)
    mixed = torch.einsum("nchw,cd->ndhw", drawn(256, 2, 8, 8), drawn(2, 6, seed=1)).relu()  # channels that go together
    teacher, x = nn.Sequential(first, nn.ReLU(), second).eval(), nn.functional.avg_pool2d(mixed, 3, 1, 1)
    run = run_of(teacher, *x.split(64))
    errors = {}
    for fit in (False, True):
        student = copy.deepcopy(teacher)
        replace_convolutions(student, make, WORDS, ALL, run, fit=fit)
        errors[fit] = apart(student, teacher, x)
    assert errors[True] < 0.65 * errors[False]


def test_statistics_of_the_teachers_norms_are_estimated_for_what_the_blocks_give(
    run_of: RunOf, drawn: Any, resnet: Any
) -> None:
    module, x = resnet(8), drawn(64, 1, 12, 12)
    replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run_of(module, x), fit=True)
    given = []
    module.stages[0][0].conv1.register_forward_hook(lambda _layer, _args, output: given.append(output))
    module(x)
    torch.testing.assert_close(module.stages[0][0].bn1.running_mean, given[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", BLOCKS, ids=["separable", "inverted"])
def test_random_inputs_fit_nothing_and_touch_no_statistics(
    make: MakeBlock, run_of: RunOf, drawn: Any, resnet: Any
) -> None:
    teacher = resnet(8)
    student = copy.deepcopy(teacher)
    replace_convolutions(student, make, WORDS, ALL, run_of(teacher, drawn(32, 1, 12, 12), real=False), fit=True)
    assert torch.equal(student.stages[0][0].bn1.running_var, teacher.stages[0][0].bn1.running_var)


def test_an_inverted_residual_gives_in_training_what_it_gives_in_evaluation(run_of: RunOf, drawn: Any) -> None:
    """Its last norm holds the statistics of what it gets on the data, and gives it back as it is."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, padding=1))
    x = drawn(256, 3, 8, 8)
    replace_convolutions(module, InvertedResidual.from_conv, WORDS, ALL, run_of(module, x), fit=True)
    assert module[2].project.bias is None
    with torch.no_grad():
        quiet = module.eval()(x)
        torch.testing.assert_close(module.train()(x), quiet, rtol=0, atol=0.02 * float(quiet.abs().max()))


def test_without_a_norm_anywhere_blocks_are_fitted_all_the_same(run_of: RunOf, drawn: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(6, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 5, stride=2))
    teacher, x = copy.deepcopy(module).eval(), drawn(64, 6, 20)
    before = copy.deepcopy(module)
    run = run_of(module, x)
    replace_convolutions(before, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=False)
    replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=True)
    assert apart(module.eval(), teacher, x) < apart(before.eval(), teacher, x)
    assert count_params(module)[0] == count_params(before)[0] == 6 * (5 + 8) + 8 + 8 * (5 + 8) + 8


def own_forward(*sizes: int) -> nn.Module:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    return Own(*sizes, padding=1)


def frozen() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv2d(8, 8, 1), "kernel of size 1"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), "2 groups"),
        (nn.ConvTranspose2d(8, 8, 3, padding=1), "not ConvTranspose2d"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "circular"),
        (own_forward(8, 8, 3), "overrides forward"),
        (frozen(), "weight is frozen"),
        (weight_norm(nn.Conv2d(8, 8, 3, padding=1)), "a parametrization"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_convolutions_that_no_block_stands_for_stay_with_the_reason(
    layer: nn.Module, said: str, run_of: RunOf, drawn: Any
) -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), layer)
    run = run_of(module, drawn(2, 8, 6, 6))
    outcome = replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=False)
    assert [change.path for change in outcome.changed] == ["0"]
    (skip,) = [skip for skip in outcome.skipped if skip.path == "1"]
    assert said in skip.reason
    assert module[1] is layer


def test_hooked_shared_and_uncalled_convolutions_stay(run_of: RunOf, drawn: Any) -> None:
    module = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
    module[0].register_forward_hook(lambda *_: None)
    module[2].weight = module[1].weight
    module.spare = nn.ModuleList([nn.Conv2d(8, 8, 3)])
    forward = nn.Sequential(*list(module)[:4]).forward
    module.forward = forward
    run = run_of(module, drawn(2, 8, 6, 6))
    outcome = replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=False)
    reasons = {skip.path: skip.reason for skip in outcome.skipped}
    assert "hooks" in reasons["0"]
    assert "weight is shared" in reasons["1"]
    assert "never calls it" in reasons["spare.0"]
    assert [change.path for change in outcome.changed] == ["3"]


def test_a_stem_of_few_channels_stays_unless_it_is_named(run_of: RunOf, drawn: Any) -> None:
    def module() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))

    for selection, stem in ((ALL, nn.Conv2d), (LayerSelection(["0"], []), DepthSeparableConv)):
        net = module()
        run = run_of(net, drawn(2, 3, 6, 6))
        replace_convolutions(net, DepthSeparableConv.from_conv, WORDS, selection, run, fit=False)
        assert type(net[0]) is stem


def test_a_convolution_whose_block_would_not_be_smaller_stays(run_of: RunOf, drawn: Any) -> None:
    """By hand, expansion 6: 8 -> 64 is 48 (8 + 9 + 64) + 2 (48 + 48 + 64) = 4,208, of 4,672; 8 -> 8 more than 584."""
    module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 64, 3, padding=1))
    run = run_of(module, drawn(2, 8, 6, 6))
    outcome = replace_convolutions(module, lambda conv: InvertedResidual.like(conv, 6), WORDS, ALL, run, fit=False)
    assert [(change.path, change.after) for change in outcome.changed] == [("1", "4,208 of 4,672 parameters")]
    assert outcome.skipped[0].reason == "a block would have 1,408 parameters, not fewer than its 584"


def test_a_model_without_such_a_convolution_is_refused_with_the_reasons(run_of: RunOf, drawn: Any) -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 1))
    run = run_of(module, drawn(2, 8, 6, 6))
    with pytest.raises(TechniqueError, match="can be replaced by a block") as refused:
        replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=False)
    assert "0: kernel of size 1" in refused.value.why
