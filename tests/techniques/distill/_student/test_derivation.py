"""Derivation of a student: steps that all methods share, compatibility, initialization."""

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
from omgoptim.techniques.distill._student.derivation import output_shapes, refuse_other_shapes, reinitialize
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


class Two(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"logits": self.head(hidden), "hidden": hidden}


def test_shapes_are_those_of_all_outputs_for_two_samples(run_of: RunOf, drawn: Any) -> None:
    module = Two()
    run = run_of(module, drawn(5, 4))
    module.train()
    assert output_shapes(module, run) == [(2, 3), (2, 6)]
    assert module.training


def test_the_layer_that_fails_is_named(run_of: RunOf, drawn: Any) -> None:
    module = Two()
    run = run_of(module, drawn(5, 4))
    module.body[0] = nn.Linear(4, 5)
    with pytest.raises(TechniqueError, match="the student does not run") as refused:
        output_shapes(module, run)
    assert "layer 'head' failed" in refused.value.why
    assert "ignore" in refused.value.fix


def test_a_forward_that_fails_between_its_layers_is_named_as_such(run_of: RunOf, drawn: Any) -> None:
    class Fixed(Two):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.body(x).view(-1, 6))}

    module = Fixed()
    run = run_of(module, drawn(5, 4))
    module.body[0] = nn.Linear(4, 5)
    with pytest.raises(TechniqueError) as refused:
        output_shapes(module, run)
    assert "the model's forward method failed" in refused.value.why


def test_outputs_of_other_shapes_are_refused(run_of: RunOf, drawn: Any) -> None:
    run = run_of(Two(), drawn(5, 4))
    refuse_other_shapes(Two(), [(2, 3), (2, 6)], run)
    with pytest.raises(TechniqueError, match="other shapes") as refused:
        refuse_other_shapes(Two(classes=2), [(2, 3), (2, 6)], run)
    assert "(2, 2)" in refused.value.why


def test_checking_draws_no_random_numbers(run_of: RunOf, drawn: Any) -> None:
    module = Two()
    run = run_of(module, drawn(5, 4))
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    output_shapes(module, run)
    assert torch.equal(torch.randn(2), expected)


class Scale(nn.Module):
    """A layer without a way to begin anew."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)
        self.one = nn.Parameter(torch.tensor([7.0]))


def built() -> nn.Module:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 0.5 + 2
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2), Scale(values))


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    one, same, other = built(), built(), built()
    for module, seed in ((one, 3), (same, 3), (other, 4)):
        reinitialize(module, seed)
    state = one.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert not torch.equal(other[0].weight, one[0].weight)


def test_layers_begin_as_they_are_built() -> None:
    module = built()
    before = copy.deepcopy(module)
    with torch.no_grad():
        module[1].running_mean.fill_(5.0)
        module[1].weight.fill_(5.0)
        module[2].in_proj_bias.fill_(5.0)
    reinitialize(module, 0)
    assert not torch.equal(module[0].weight, before[0].weight)
    assert torch.equal(module[1].running_mean, torch.zeros(4))
    assert torch.equal(module[1].weight, torch.ones(4))
    assert torch.equal(module[2].in_proj_bias, torch.zeros(12))


def test_a_layer_that_cannot_begin_anew_keeps_mean_and_deviation_of_its_weights() -> None:
    module = built()
    before = module[3].weight.detach().clone()
    reinitialize(module, 0)
    assert not torch.equal(module[3].weight, before)
    assert abs(float(module[3].weight.detach().mean()) - 2) < 0.05
    assert abs(float(module[3].weight.detach().std()) - 0.5) < 0.05
    assert module[3].one.item() == 7.0


def test_the_random_numbers_of_others_go_on_as_if_nothing_was_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    module = built()
    torch.manual_seed(0)
    reinitialize(module, 5)
    assert torch.equal(torch.randn(3), expected)


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
    with pytest.raises(TechniqueError, match="'nowhere' matches no layer"):
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
