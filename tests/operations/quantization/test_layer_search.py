"""The search for the layers to keep in float, with an evaluator that is a pure function of the set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from omgoptim.operations.quantization.layer_search import (
    LayerSearchResult,
    LayerSets,
    SearchLayer,
    first_guess,
    rank_layers,
)
from omgoptim.operations.quantization.layer_search import find_float_layers as search_sets


@dataclass
class Evaluator:
    """A drop that is the sum of what each quantized layer costs, and a count of who asked."""

    drops: dict[str, float]
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, kept: tuple[str, ...]) -> float:
        self.asked.append(kept)
        return sum(drop for name, drop in self.drops.items() if name not in kept)

    @property
    def whole(self) -> float:
        return sum(self.drops.values())


def find_float_layers(
    some: list[SearchLayer],
    drop: float,
    guard: float,
    evaluate: Callable[[tuple[str, ...]], float],
    holds: Callable[[float, float], bool] = lambda drop, guard: drop <= guard,
    **functions: Any,
) -> LayerSearchResult:
    return search_sets(some, drop, guard, LayerSets(evaluate, **functions), holds)


def layers(noise: dict[str, float], sizes: dict[str, int] | None = None) -> list[SearchLayer]:
    sizes = sizes or {}
    return [SearchLayer(name, name, sizes.get(name, 1000), power) for name, power in noise.items()]


def test_one_bad_layer_is_kept_in_float_in_one_evaluation() -> None:
    noise = {f"layer{index}": 0.001 for index in range(30)} | {"bad": 0.5}
    evaluator = Evaluator({"bad": 0.2, "layer3": 0.002})
    found = find_float_layers(layers(noise), evaluator.whole, 0.01, evaluator)
    assert found.best.kept == ("bad",)
    assert found.best.drop == pytest.approx(0.002)
    assert evaluator.asked == [("bad",)]


def test_several_bad_layers_are_found_with_logarithmically_many_evaluations() -> None:
    names = [f"layer{index}" for index in range(64)]
    noise = {name: 1.0 / (index + 1) for index, name in enumerate(names)}
    evaluator = Evaluator(dict.fromkeys(names[:11], 0.01))
    found = find_float_layers(layers(noise), evaluator.whole, 0.001, evaluator)
    assert set(found.best.kept) == set(names[:11])
    assert found.best.drop == 0
    assert len(evaluator.asked) <= 12


def test_layers_that_turn_out_unnecessary_are_given_back_the_largest_first() -> None:
    noise = {"big": 1.0, "noisy": 1.0, "last": 0.02, **{f"layer{i}": 1e-6 for i in range(5)}}
    sizes = {"big": 1500}
    evaluator = Evaluator({"noisy": 0.1, "last": 0.05})
    found = find_float_layers(layers(noise, sizes), evaluator.whole, 0.001, evaluator)
    assert set(found.best.kept) == {"noisy", "last"}
    assert found.best.drop == 0


def test_what_costs_few_bytes_for_its_noise_comes_first() -> None:
    order = rank_layers(
        layers({"large": 0.5, "small": 0.4, "silent": 0.0}, {"large": 100_000, "small": 100, "silent": 100})
    )
    assert [layer.name for layer in order] == ["small", "large", "silent"]


def test_the_first_guess_leaves_the_noise_that_the_guard_allows() -> None:
    powers = {"a": 0.6, "b": 0.2, "c": 0.1, "d": 0.1}

    def noise(kept: tuple[str, ...]) -> float:
        return sum(power for name, power in powers.items() if name not in kept)

    order = layers(powers)
    assert first_guess(order, 0.1, 0.05, noise) == 1
    assert first_guess(order, 0.1, 0.025, noise) == 2
    assert first_guess(order, math.inf, 0.01, noise) == 1
    assert first_guess(layers({"a": 0.0, "b": 0.0}), 0.1, 0.0, lambda _: 0.0) == 1


def test_an_impossible_guard_ends_with_the_set_that_loses_least_and_one_layer_stays_quantized() -> None:
    names = [f"layer{index}" for index in range(6)]
    evaluator = Evaluator({"elsewhere": 0.3, "layer0": 0.1})
    found = find_float_layers(layers(dict.fromkeys(names, 0.1)), evaluator.whole, 0.01, evaluator)
    assert found.best.drop == pytest.approx(0.3)
    assert "layer0" in found.best.kept
    assert max(len(kept) for kept in evaluator.asked) == 5
    assert not found.out_of_time


def test_nothing_that_can_be_kept_leaves_the_plain_candidate() -> None:
    for some in ([], layers({"only": 0.1})):
        found = find_float_layers(some, 0.2, 0.01, lambda kept: pytest.fail(f"asked for {kept}"))
        assert found.best.kept == ()
        assert found.best.drop == 0.2


def test_a_candidate_that_cannot_be_made_is_no_answer_and_the_search_goes_on() -> None:
    noise = {"bad": 0.9, "other": 0.05, "third": 0.01, "fourth": 0.01}

    def evaluate(kept: tuple[str, ...]) -> float:
        return math.inf if kept == ("bad",) else 0.0 if "bad" in kept else 0.2

    found = find_float_layers(layers(noise), 0.2, 0.01, evaluate)
    assert set(found.best.kept) == {"bad", "other"}
    assert found.trials[0].drop == math.inf


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 5])
def test_when_time_is_out_the_best_so_far_is_the_answer(allowed: int) -> None:
    names = [f"layer{index}" for index in range(40)]
    evaluator = Evaluator(dict.fromkeys(names[:20], 0.01))
    noise = {name: 0.1 if index else 5.0 for index, name in enumerate(names)}
    found = find_float_layers(
        layers(noise), evaluator.whole, 0.004, evaluator, out_of_time=lambda: len(evaluator.asked) >= allowed
    )
    assert len(evaluator.asked) == allowed
    assert found.out_of_time
    assert found.best.drop == min([evaluator.whole, *(trial.drop for trial in found.trials)])


def test_whether_a_drop_holds_is_for_the_caller_to_say() -> None:
    evaluator = Evaluator({"a": 0.1, "b": 0.1, "c": 0.1})
    noise = layers({"a": 0.3, "b": 0.2, "c": 0.1})
    found = find_float_layers(noise, evaluator.whole, 0.1, evaluator, holds=lambda drop, guard: drop < guard / 2)
    assert len(found.best.kept) == 2  # the third stays quantized and costs 0.1, which this caller does not take
    assert found.best.drop == pytest.approx(0.1)


def test_what_the_prediction_spares_is_given_back_at_once() -> None:
    """A noise that does not add up: the first layer drowns the others, which are silent once it is in float."""
    names = [f"layer{index}" for index in range(12)]
    evaluator = Evaluator({"layer0": 0.2, "layer7": 0.05})

    def predict(kept: tuple[str, ...]) -> float:
        return 1e-6 + (0.0 if "layer0" in kept else 1.0) + (0.0 if "layer7" in kept else 0.01)

    noise = {name: 0.5 if name == "layer0" else 0.1 + 0.001 * (7 - index) for index, name in enumerate(names)}
    found = find_float_layers(layers(noise), evaluator.whole, 0.001, evaluator, predict=predict)
    assert set(found.best.kept) == {"layer0", "layer7"}
    assert ("layer0", "layer7") in evaluator.asked[:7]  # six that find the head of eight, and this one


def test_no_set_is_evaluated_that_could_not_pay_and_the_search_says_that_it_stopped_for_that() -> None:
    names = [f"layer{index}" for index in range(16)]
    evaluator = Evaluator(dict.fromkeys(names, 0.01))  # all of them are needed
    found = find_float_layers(
        layers(dict.fromkeys(names, 1.0)), evaluator.whole, 0.0, evaluator, worthwhile=lambda kept: len(kept) <= 4
    )
    assert found.not_worthwhile
    assert evaluator.asked
    assert max(map(len, evaluator.asked)) <= 4

    evaluator = Evaluator({names[0]: 0.1})
    found = find_float_layers(
        layers(dict.fromkeys(names, 1.0)), 0.1, 0.01, evaluator, worthwhile=lambda kept: len(kept) <= 4
    )
    assert not found.not_worthwhile  # a set that pays holds
    assert found.best.kept == (names[0],)


def test_where_no_layer_in_float_could_pay_nothing_is_evaluated() -> None:
    evaluator = Evaluator({"a": 0.1, "b": 0.1})
    found = find_float_layers(layers({"a": 1.0, "b": 0.5}), 0.2, 0.01, evaluator, worthwhile=lambda kept: not kept)
    assert found.not_worthwhile
    assert evaluator.asked == []
    assert found.best.kept == ()
