"""Steps that all derivations of a student share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import Depthwise, Derived, FewerLayers, InvertedResidual, LowRank, Narrow
from omgoptim.techniques.registry import ModuleRun, apply_to_module

RunOf = Callable[..., ModuleRun]
IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))
STUDENTS: list[Derived] = [
    Narrow(width=0.5),
    Narrow(width=0.5, depth=0.5),
    Depthwise(width=0.75),
    InvertedResidual(depth=0.5),
    LowRank(),
    FewerLayers(width=0.75),
]


@pytest.mark.parametrize("initialize", ["teacher", "random"])
@pytest.mark.parametrize("params", STUDENTS, ids=lambda params: params.student)
def test_a_student_is_smaller_runs_as_its_teacher_and_comes_back_from_its_recipe(
    params: Derived, initialize: str, run_of: RunOf, resnet: Any, outputs_of: Any, reopened: Any
) -> None:
    teacher = resnet(16, (1, 3, 1), channels=3)
    run, student = run_of(teacher, IMAGES), copy.deepcopy(teacher)
    outcome = apply_to_module(student, params.model_copy(update={"initialize": initialize}), run)
    assert outcome.changed
    assert count_params(student)[0] < count_params(teacher)[0]
    given = outputs_of(student, IMAGES)
    assert given.shape == (32, 10)
    assert torch.isfinite(given).all()
    assert not student.training
    assert torch.equal(outputs_of(reopened(teacher, student), IMAGES), given)


@pytest.mark.parametrize("params", [Narrow(width=0.5), InvertedResidual(width=0.5), LowRank(initialize="random")])
def test_the_same_seed_gives_the_same_student_and_the_teacher_is_not_touched(
    params: Derived, run_of: RunOf, resnet: Any
) -> None:
    teacher = resnet(8, channels=3)
    before, run = copy.deepcopy(teacher.state_dict()), run_of(teacher, IMAGES, seed=3)
    states = []
    for _ in range(2):
        student = copy.deepcopy(teacher)
        torch.manual_seed(len(states))  # whatever the process drew before
        apply_to_module(student, params, run)
        states.append(student.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_random_weights_are_not_the_teachers_in_the_shape_of_the_teachers_student(run_of: RunOf, resnet: Any) -> None:
    teacher = resnet(8, channels=3)
    run = run_of(teacher, IMAGES)
    kept, random = copy.deepcopy(teacher), copy.deepcopy(teacher)
    apply_to_module(kept, Narrow(width=0.5), run)
    apply_to_module(random, Narrow(width=0.5, initialize="random"), run)
    shapes = {name: tensor.shape for name, tensor in kept.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in random.state_dict().items()}
    assert not torch.equal(kept.head.weight, random.head.weight)
    assert torch.equal(random.stem[1].running_mean, torch.zeros(4))


def test_depth_goes_first_and_targets_hold_for_the_layers_that_they_named(run_of: RunOf, drawn: Any) -> None:
    teacher = nets.Vit(24, *(nets.FusedAttention(24, 4) for _ in range(4))).eval()
    run = run_of(teacher, drawn(4, 3, 16, 16))
    apply_to_module(teacher, FewerLayers(keep_layers=2, width=0.5, ignore=["blocks.0", "blocks.3.fc1"]), run)
    assert [block.fc1.out_features for block in teacher.blocks] == [96, 48, 96]  # 0 stays; of 1, 2 and 3 two do
    assert [block.attention.num_heads for block in teacher.blocks] == [4, 2, 2]


@pytest.mark.parametrize("glob", [{"targets": ["nowhere"]}, {"ignore": ["nowhere"]}])
@pytest.mark.parametrize("kind", [Narrow, Depthwise, InvertedResidual, LowRank, FewerLayers])
def test_a_glob_that_names_no_layer_is_refused(
    kind: type[Derived], glob: dict[str, list[str]], run_of: RunOf, resnet: Any
) -> None:
    teacher = resnet(8, channels=3)
    with pytest.raises(TechniqueError, match="'nowhere' names no layer"):
        apply_to_module(teacher, kind(**glob), run_of(teacher, IMAGES))


class Counted(nn.Module):
    """Encoder whose forward has a fixed number of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(4):
            x = torch.tanh(self.layers[index](x))
        return x


def test_a_student_that_does_not_run_is_refused(run_of: RunOf, drawn: Any) -> None:
    teacher = Counted()
    with pytest.raises(TechniqueError, match="the student does not run") as refused:
        apply_to_module(teacher, FewerLayers(), run_of(teacher, drawn(8, 4), real=False))
    assert "len(self.layers)" in refused.value.fix


def test_a_student_that_would_be_its_teacher_is_refused_with_a_way_out(run_of: RunOf, resnet: Any) -> None:
    teacher = resnet(8, channels=3)
    with pytest.raises(TechniqueError, match="no layer of this model can be narrowed") as refused:
        apply_to_module(teacher, Narrow(width=1.0), run_of(teacher, IMAGES))
    assert "student fewer_layers" in refused.value.fix
