from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.blocks import DepthSeparableConv, InvertedResidual
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
