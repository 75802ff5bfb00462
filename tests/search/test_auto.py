"""The space of a given model: its stages, the options that work on them, and modules that run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.architecture_search.auto import INPUT_SIZE, KEEP, MAX_OPTIONS, AutoSpace, auto_space, stages_of
from omgoptim.errors import TechniqueError
from omgoptim.models.samples import Samples
from omgoptim.models.structural_diff import StructuralDiff, apply_diff, compute_diff
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.registry import ModuleRun


def network() -> nn.Module:
    torch.manual_seed(0)

    def stage(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

    return nn.Sequential(
        nn.Sequential(stage(3, 16), stage(16, 32)),
        nn.Sequential(stage(32, 32), stage(32, 32)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


def run_of(model: nn.Module, scratch: Path) -> ModuleRun:
    images = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    return ModuleRun(
        Signature((InputTensor("x", "float32", ("batch", 3, 8, 8), False),), "tensor"),
        Samples([{"x": images}], [None]),
        lambda outputs, target: outputs.square().mean(),
        copy.deepcopy(model),
        scratch,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoSpace, ModuleRun]:
    model = network()
    run = run_of(model, tmp_path_factory.mktemp("scratch"))
    return auto_space(model, run, stages=5), run


def test_stages_follow_the_models_containers_and_leave_no_layer_out() -> None:
    assert [stage.name for stage in stages_of(network(), 3)] == ["0", "1", "4"]
    finer = stages_of(network(), 5)
    assert [stage.name for stage in finer] == ["0.0", "0.1", "1.0", "1.1", "4"]
    assert sum(stage.params for stage in finer) == sum(weight.numel() for weight in network().parameters())


def test_more_layers_than_stages_are_put_together_in_their_order() -> None:
    flat = nn.Sequential(nn.Sequential(*(nn.Linear(8, 8) for _ in range(7))), nn.Linear(8, 2))
    found = stages_of(flat, 4)
    assert [stage.targets for stage in found] == [("0.0", "0.1"), ("0.2", "0.3"), ("0.4", "0.5", "0.6"), ("1",)]
    assert sum(stage.params for stage in found) == sum(weight.numel() for weight in flat.parameters())


def test_every_stage_can_be_kept_and_has_few_options(made: tuple[AutoSpace, ModuleRun]) -> None:
    for knob in made[0].space.knobs:
        assert knob.options[0] == KEEP
        assert 2 <= len(knob.options) <= MAX_OPTIONS
    assert {"narrow 0.5", "depthwise"} <= {option for knob in made[0].space.knobs for option in knob.options}


def test_keeping_everything_builds_the_model_itself(made: tuple[AutoSpace, ModuleRun]) -> None:
    space, run = made
    module = space.build({knob.name: KEEP for knob in space.space.knobs}, run)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(module(x), space.model(x))
    assert module is not space.model


def test_any_configuration_runs_is_smaller_and_leaves_the_model_as_it_was(made: tuple[AutoSpace, ModuleRun]) -> None:
    space, run = made
    before = copy.deepcopy(space.model.state_dict())
    rows = np.random.default_rng(0).permutation(space.space.all_rows)[:6]
    for row in rows:
        configuration = space.space.configuration(row)
        module = space.build(configuration, run)
        assert module(torch.randn(2, 3, 8, 8)).shape == (2, 10)
        sizes = [sum(weight.numel() for weight in each.parameters()) for each in (module, space.model)]
        assert sizes[0] < sizes[1] or set(configuration.values()) == {KEEP}
    for name, tensor in space.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_the_size_of_images_is_a_choice_that_keeps_inputs_outputs_and_parameters(
    made: tuple[AutoSpace, ModuleRun],
) -> None:
    space, run = made
    kept = {knob.name: KEEP for knob in space.space.knobs}
    smaller = space.build(kept | {INPUT_SIZE: "0.5"}, run)
    x = torch.randn(2, 3, 8, 8)
    halved = nn.functional.interpolate(x, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(smaller(x), space.model(halved))
    assert smaller.state_dict().keys() == space.model.state_dict().keys()
    rebuilt = network()
    change = compute_diff(rebuilt, smaller)
    assert change is not None
    apply_diff(rebuilt, StructuralDiff.from_json(change.to_json()))
    rebuilt.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(rebuilt(x), smaller(x))


def test_the_size_of_what_is_no_image_is_no_choice(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    run = replace(run_of(model, tmp_path), statistics=Samples([{"x": np.ones((4, 8), np.float32)}], [None]))
    assert INPUT_SIZE not in {knob.name for knob in auto_space(model, run).space.knobs}


def test_a_model_without_layers_to_vary_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.ReLU()).eval()
    with pytest.raises(TechniqueError, match="no part of this model"):
        auto_space(model, run_of(model, tmp_path))
