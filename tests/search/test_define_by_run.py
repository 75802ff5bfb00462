"""A user's space is explored by calling it, and its failures are reported with their reasons."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from omgoptim.architecture_search.define_by_run import build, probe_space
from omgoptim.errors import UserCodeError


def product(trial: Any) -> nn.Module:
    width = trial.suggest_categorical("width", [8, 16, 32])
    depth = trial.suggest_int("depth", 1, 3)
    dropout = trial.suggest_float("dropout", 0.0, 0.2, step=0.1)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)), nn.Dropout(dropout))


def conditional(trial: Any) -> nn.Module:
    depth = trial.suggest_int("depth", 1, 3)
    return nn.Sequential(*(nn.Linear(4, trial.suggest_categorical(f"width{at}", [4, 8])) for at in range(depth)))


def continuous(trial: Any) -> nn.Module:
    return nn.Dropout(trial.suggest_float("dropout", 0.0, 0.5))


def test_a_space_that_always_asks_the_same_is_a_product_of_knobs() -> None:
    space = probe_space(product, seed=0).space
    assert space is not None
    assert {knob.name: knob.options for knob in space.knobs} == {
        "width": (8, 16, 32),
        "depth": (1, 2, 3),
        "dropout": (0.0, 0.1, 0.2),
    }


@pytest.mark.parametrize("function", [conditional, continuous])
def test_a_conditional_or_continuous_space_is_no_product(function: Any) -> None:
    assert probe_space(function, seed=0).space is None


def test_a_configuration_builds_its_module() -> None:
    module = build(product, {"width": 16, "depth": 2, "dropout": 0.1})
    assert [type(layer).__name__ for layer in module.children()] == ["Linear", "Linear", "Dropout"]
    with pytest.raises(UserCodeError, match="'depth'"):
        build(product, {"width": 16})


def sometimes(trial: Any) -> nn.Module:
    if trial.suggest_categorical("kernel", [1, 9]) == 9:
        raise RuntimeError("Kernel size can't be greater than actual input size")
    return nn.Identity()


def test_a_space_that_fails_for_some_choices_is_still_searched() -> None:
    found = probe_space(sometimes, seed=0)
    assert found.space is not None
    assert found.space.knobs[0].options == (1, 9)
    assert 0 < len(found.reasons) < found.calls
    assert "Kernel size" in found.reasons[0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda trial: None, "returned no module|gave no module"),
        (lambda trial: 1 / 0, "gave no module"),
        (lambda trial: nn.Identity(), "varies nothing"),
    ],
)
def test_a_space_that_is_none_is_refused(function: Any, said: str) -> None:
    with pytest.raises(UserCodeError, match=said):
        probe_space(function, seed=0)


def test_it_takes_and_gives_what_an_optuna_trial_does() -> None:
    optuna = pytest.importorskip("optuna")
    chosen = {"width": 32, "depth": 3, "dropout": 0.2}
    assert str(build(product, chosen)) == str(product(optuna.trial.FixedTrial(chosen)))
