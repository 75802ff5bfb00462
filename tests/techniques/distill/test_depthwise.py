from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from omgoptim.blocks import DepthSeparableConv
from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import Depthwise
from omgoptim.techniques.registry import apply_to_module


def test_every_3x3_but_the_stem_becomes_depth_separable(run_of: Any, drawn: Any, resnet: Any) -> None:
    """By hand, w = 24: of 24, 48 and 96 channels 9 i + i o weights each instead of 9 i o."""
    teacher = resnet(24)
    before = count_params(teacher)[0]
    apply_to_module(teacher, Depthwise(), run_of(teacher, drawn(32, 1, 12, 12)))
    pairs = [(24, 24), (24, 24), (24, 48), (48, 48), (48, 96), (96, 96)]
    saved = sum(9 * i * o - 9 * i - i * o for i, o in pairs)
    assert count_params(teacher)[0] == before - saved
    assert sum(isinstance(layer, DepthSeparableConv) for layer in teacher.modules()) == 6
    assert isinstance(teacher.stem[0], nn.Conv2d)


def test_width_goes_before_the_blocks(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(24)
    apply_to_module(teacher, Depthwise(width=0.5), run_of(teacher, drawn(32, 1, 12, 12)))
    last = teacher.stages[2][0].conv2
    assert (last.in_channels, last.out_channels) == (48, 48)
    assert last.pointwise.weight.shape == (48, 48, 1, 1)


def test_a_student_of_one_dimension_learns_from_the_start_that_it_has(run_of: Any, drawn: Any) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv1d(6, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 8, 5, padding=2)).eval()
    x = drawn(64, 6, 20)
    run, random = run_of(teacher, x), copy.deepcopy(teacher)
    student = copy.deepcopy(teacher)
    apply_to_module(student, Depthwise(), run)
    apply_to_module(random, Depthwise(initialize="random"), run)
    with torch.no_grad():
        errors = [float((each(x) - teacher(x)).norm()) for each in (student, random)]
    assert errors[0] < 0.7 * errors[1]


def test_a_model_without_convolutions_is_refused(run_of: Any, drawn: Any) -> None:
    teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(
        TechniqueError, match="no convolution of this model can be replaced by a depthwise-separable convolution"
    ) as error:
        apply_to_module(teacher, Depthwise(), run_of(teacher, drawn(4, 4)))
    assert error.value.why == "it has no convolution"
    assert "student narrow" in error.value.fix
