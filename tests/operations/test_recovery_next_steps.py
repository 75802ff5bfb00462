"""Tests of the calls that are proposed after a model was reshaped: each follows from what was measured."""

from __future__ import annotations

import itertools
import shlex
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from omgoptim.cli import options
from omgoptim.operations.next_steps import quantize_steps, repeat_command, without_repeats
from omgoptim.operations.recovery_next_steps import RunResult, next_steps
from omgoptim.reports import Candidate, EfficiencyReport, Epoch, Gains, NextStep, Round, Training
from omgoptim.requests import Request, parse

MODEL = {"model": "net.py:build", "data": "net.py:load"}
GOALS: dict[str, list[dict[str, Any]]] = {
    "prune": [
        {},
        {"pruning_ratio": 0.6, "rounds": 100, "epochs": 10_000},
        {"target_speedup": 3.0},
        {"target_speedup": 3.0, "max_layer_ratio": 0.99, "round_to": 1},
        {"target_latency_ms": 1.0},
        {"target_macs_ratio": 1.02},
        {"method": "magnitude", "sparsity": 0.9, "schedule": "0.5,0.9"},
        {"method": "semi_structured"},
    ],
    "factorize": [{}, {"target_compression": 1.01}, {"rank": 4, "epochs": 0}, {"rank_ratio": 0.5}, {"energy": 1.0}],
    "distill": [
        {},
        {"student": "net.py:small"},
        {"student": "narrow", "width": 0.5},
        {"student": "fewer_layers", "keep_layers": 2},
        {"target_compression": 1.02, "epochs": 10_000},
    ],
}
QUANTIZE: list[dict[str, Any]] = [
    {},
    {"scheme": "bf16"},
    {"scheme": "static", "effort": "best"},
    {"scheme": "qat"},
    {"timing": "quick", "samples": 1_000_000},
]
OUTCOMES = ("ok", "no_gain", "guard_failed")


def loaded(real: bool = True) -> Any:
    return SimpleNamespace(data=SimpleNamespace(real=real), evaluation=SimpleNamespace(count=2000), module=object())


def trained(*best: bool) -> Training:
    epochs = [Epoch(epoch=i, loss=1.0, learning_rate=0.1, seconds=1, best=one) for i, one in enumerate(best, start=1)]
    return Training(epochs=epochs, optimizer="adamw", loss="l", trained_params=1, total_params=1, seconds=1)


def report(verb: str, asked: Request, outcome: str, steps: list[NextStep], **more: Any) -> EfficiencyReport:
    here = {"cpu": "c", "threads": 1, "python": "p", "versions": {}, "seed": 0}
    told = {"outcome": outcome, "summary": "s", "verb": verb, "run_id": "r", "request": {}, "repeat": "c"}
    return EfficiencyReport.model_validate(told | {"environment": here, "next_steps": steps} | more)


def reshaped(verb: str, asked: dict[str, Any], outcome: str, real: bool = True, **measured: Any) -> list[NextStep]:
    request: Any = parse(verb, MODEL | asked)
    result = RunResult(outcome, "run-1", measured.pop("gains", Gains()), **measured)
    return without_repeats(report(verb, request, outcome, next_steps(request, loaded(real), result)), request)


def every_step() -> list[tuple[str, Request, NextStep]]:
    """The steps of every verb over goals, outcomes and what training and rounds showed."""
    found: list[tuple[str, Request, NextStep]] = []
    for verb, goals in GOALS.items():
        facts = itertools.product(
            goals,
            OUTCOMES,
            (True, False),
            (None, trained(True, False), trained(False, True)),
            ((), (Round(number=1, kept=True), Round(number=2))),
            (Gains(quality_drop=0.2), Gains(quality_drop=0.0, speedup=1.9, speedup_low=1.8), Gains()),
        )
        for asked, outcome, real, training, rounds, gains in facts:
            missed = outcome == "guard_failed"
            steps = reshaped(verb, asked, outcome, real, training=training, rounds=rounds, gains=gains, missed=missed)
            found += [(verb, parse(verb, MODEL | asked), one) for one in steps]
    for asked, outcome, interval, needed, real in itertools.product(
        QUANTIZE, OUTCOMES, (True, False), (None, 3000), (True, False)
    ):
        request: Any = parse("quantize", MODEL | asked)
        steps = quantize_steps(request, outcome, "run-1", interval, needed, loaded(real))
        found += [
            ("quantize", request, one) for one in without_repeats(report("quantize", request, outcome, steps), request)
        ]
    return found


STEPS = every_step()


def test_no_report_proposes_the_call_that_was_just_made() -> None:
    for verb, request, one in STEPS:
        assert (one.tool, parse(one.tool, one.arguments)) != (verb, request), one


def test_every_proposed_call_parses_and_its_command_asks_for_the_same() -> None:
    assert {one.tool for _, _, one in STEPS} == {"prune", "factorize", "distill", "quantize", "profile"}
    for _, _, one in STEPS:
        request = parse(one.tool, one.arguments)
        assert one.command == repeat_command(request)
        words = shlex.split(one.command)
        assert words[:2] == ["omgoptim", one.tool]
        known = {option.name for option in options.options_of(type(request))}
        flags = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
        assert {flag.removeprefix("no_") if flag not in known else flag for flag in flags} <= known


def test_more_epochs_never_follow_a_speed_that_no_cut_reaches() -> None:
    gains = Gains(speedup=1.9, speedup_low=1.8, quality_drop=0.0)
    asked = {"target_speedup": 3.0, "epochs": 2}
    steps = reshaped("prune", asked, "guard_failed", missed=True, gains=gains, training=trained(False, True))
    assert [one.tool for one in steps] == ["quantize", "prune", "distill"]
    assert steps[0].arguments["model"] == "run-1"
    assert steps[1].arguments["max_layer_ratio"] > 0.9
    assert all(one.arguments.get("epochs", 2) == 2 for one in steps)
    assert steps[1].arguments["round_to"] == 1
    widest = asked | {"max_layer_ratio": 0.98, "round_to": 1}
    steps = reshaped("prune", widest, "guard_failed", missed=True, gains=gains)
    assert [one.arguments.get("target_speedup") for one in steps] == [None, 3.0, 1.84]


def test_longer_training_is_proposed_only_where_the_last_epoch_was_the_best() -> None:
    for training, longer in ((trained(True, False), False), (trained(False, True), True), (None, True)):
        steps = reshaped("factorize", {"epochs": 2}, "guard_failed", gains=Gains(quality_drop=0.3), training=training)
        assert any(one.arguments.get("epochs") == 4 for one in steps) is longer
        assert any(one.arguments.get("target_compression") == 1.41 for one in steps)


@pytest.mark.parametrize("drop", [0.005, 0.2])
def test_a_scheme_is_proposed_after_a_failed_guard_only_as_far_as_its_candidate_held_it(drop: float) -> None:
    request: Any = parse("quantize", MODEL)
    statuses = get_args(Candidate.model_fields["status"].annotation)
    assert "dropped" in statuses
    tried = Candidate(
        name="bf16 on openvino",
        scheme="bf16",
        runtime="openvino",
        quality_drop=drop,
        speedup=2.0,
        size_ratio=2.0,
        status="dropped",
        why="w",
    )
    steps = quantize_steps(request, "guard_failed", "run-1", True, None, loaded())
    steps = without_repeats(report("quantize", request, "guard_failed", steps, candidates=[tried]), request)
    halves = [one.arguments for one in steps if one.arguments.get("scheme") == "bf16"]
    expected = MODEL | {"max_quality_drop": 0.01, "scheme": "bf16", "runtime": "openvino"}
    assert (steps[0].arguments == expected) is (drop < 0.01)
    assert bool(halves) is (drop < 0.01)


@pytest.mark.parametrize(
    ("asked", "proposed"),
    [({"rank_ratio": 0.5}, {"rank_ratio": 0.75}), ({"energy": 0.9}, {"energy": 0.95}), ({"rank": 4}, {"rank": 8})],
)
def test_a_factorization_that_lost_too_much_is_proposed_with_more_of_each_layer(
    asked: dict[str, Any], proposed: dict[str, Any]
) -> None:
    steps = reshaped("factorize", asked, "guard_failed", training=trained(True, False))
    assert any(proposed.items() <= step.arguments.items() for step in steps)
