"""Next steps after a model was pruned, factorized or distilled: what the measured rounds and epochs leave open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import common_arguments, same_arguments, step
from omgoptim.operations.verdict import holds
from omgoptim.reports import Gains, NextStep, Round, Training
from omgoptim.requests import DistillRequest, FactorizeRequest, PruneRequest
from omgoptim.requests.distill import Auto, Given
from omgoptim.requests.factorize import Factorization
from omgoptim.requests.prune import Structured

Reshaping = PruneRequest | FactorizeRequest | DistillRequest

MOST_EPOCHS, MOST_ROUNDS, MOST_LAYER_RATIO = 10_000, 100, 0.97
"""Bounds of what is proposed; the first two are the requests' own."""

MOST_KEPT = 0.99
"""Share of a layer, or of its energy, above which a factorization that keeps more is not proposed."""

WORTH_ASKING = 1.1
"""Smallest speedup that is proposed as a goal."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run that reshapes a model has measured, as far as advice follows from it."""

    outcome: str
    run_id: str
    gains: Gains
    missed: bool = False
    """Whether the goal was not reached."""
    rounds: Sequence[Round] = ()
    training: Training | None = None


def next_steps(verb: str, request: Reshaping, loaded: LoadedModel, result: Result) -> list[NextStep]:
    """What helps with what is still open, and what comes after it."""
    steps: list[NextStep] = []
    again = {
        name: value
        for name, value in common_arguments(request).items()
        if name in ("data", "metric", "inputs", "project", "python")
    }
    failed = result.outcome == "guard_failed"
    if failed and _missed_speed(request, result):
        steps += _reachable_speed(request, result, loaded)
    elif failed:
        steps += _to_lose_less(verb, request, loaded, result)
    single_weights = isinstance(request, PruneRequest) and not isinstance(request.method, Structured)
    slower = result.gains.speedup_low is None or result.gains.speedup_low <= 1
    if single_weights and slower and not failed:
        why = "zeros do not make a dense engine faster; removed channels do"
        steps.append(step("prune", common_arguments(request) | {"method": "structured"}, why))
    if not failed or result.missed:
        why = "quantize what was kept: the gains multiply, and quantization goes last"
        steps.insert(0 if failed else len(steps), step("quantize", {"model": result.run_id, **again}, why))
    if result.outcome == "ok" and len(steps) < 3:
        why = "see where the time is now, on the hardware it runs on"
        steps.append(step("profile", {"model": result.run_id, **again}, why))
    return steps[:3]


def _missed_speed(request: Reshaping, result: Result) -> bool:
    """Whether a goal in time was not reached though the guard was held and every round was kept."""
    if not isinstance(request, PruneRequest) or not isinstance(request.method, Structured):
        return False
    in_time = request.method.target_speedup is not None or request.method.target_latency_ms is not None
    return in_time and result.missed and not _cut_short(result) and _held(request, result)


def _cut_short(result: Result) -> bool:
    """Whether the last round lost too much, so that an earlier one is the artifact."""
    return bool(result.rounds) and not result.rounds[-1].kept


def _held(request: Reshaping, result: Result) -> bool:
    drop = result.gains.quality_drop
    return drop is not None and holds(drop, request.max_quality_drop)


def _reachable_speed(request: Reshaping, result: Result, loaded: LoadedModel) -> list[NextStep]:
    """After a speed that no cut reaches: wider limits of what may be removed, or a student; the nearest speed last.

    More training is not among them: it changes no time.
    """
    assert isinstance(request, PruneRequest)
    assert isinstance(request.method, Structured)
    given = same_arguments(request)
    steps = []
    if request.method.max_layer_ratio < MOST_LAYER_RATIO or request.method.round_to != 1:
        limits = {"max_layer_ratio": max(MOST_LAYER_RATIO, request.method.max_layer_ratio), "round_to": 1}
        why = "the narrowest widths that were allowed are too slow: these limits allow narrower ones"
        steps.append(step("prune", given | limits, why))
    asked, reached = request.method.target_speedup, result.gains.speedup
    if asked is not None and loaded.data.real:
        why = "a student of another form can be faster than the narrowest cut of this model"
        steps.append(step("distill", common_arguments(request) | {"student": "auto", "target_speedup": asked}, why))
    if reached is not None and reached >= WORTH_ASKING:
        goal = {name: value for name, value in given.items() if name not in ("target_speedup", "target_latency_ms")}
        nearest = int(reached * 0.97 * 100) / 100
        steps.append(step("prune", goal | {"target_speedup": nearest}, f"{nearest:g}x is the nearest speed in reach"))
    return steps


def _to_lose_less(verb: str, request: Reshaping, loaded: LoadedModel, result: Result) -> list[NextStep]:
    """After a guard that failed: data, training where training helped, smaller steps, and a smaller goal."""
    given = same_arguments(request)
    if not loaded.data.real:
        known = {key: value for key, value in given.items() if key != "inputs"} | {"data": "file.py:load"}
        return [step(verb, known, "training brings back what was lost: give data")]
    epochs = 1 if request.epochs is None else request.epochs
    steps = []
    if _still_improving(result.training) and epochs < MOST_EPOCHS:
        why = "quality still rose in the last epoch: longer training brings more back"
        if result.training is None:
            why = "nothing was trained: training brings back what was lost"
        steps.append(step(verb, given | {"epochs": min(MOST_EPOCHS, max(2, 2 * epochs))}, why))
    if isinstance(request, PruneRequest) and request.amounts is None and request.goal is not None:
        rounds = min(MOST_ROUNDS, max(3, 2 * request.rounds))
        if rounds > request.rounds:
            why = "smaller steps, each trained back, lose less than one large one"
            steps.append(step(verb, given | {"rounds": rounds, "epochs": max(1, epochs)}, why))
    smaller = _smaller_goal(request, result)
    if smaller:
        steps.append(step(verb, given | smaller, _why_smaller(request)))
    return steps


def _still_improving(training: Training | None) -> bool:
    """Whether the last epoch was the best of its round, or nothing was trained: more may help then, else not."""
    if training is None or not training.epochs:
        return True
    of_last = [epoch for epoch in training.epochs if epoch.round == training.epochs[-1].round]
    return of_last[-1].best


def _smaller_goal(request: Reshaping, result: Result) -> dict[str, Any]:
    """The goal with less taken away: what a kept round reached, else half of the way; empty where there is none."""
    if isinstance(request, PruneRequest):
        return _smaller_amount(request, result)
    if isinstance(request, FactorizeRequest):
        return _more_of_each_layer(request.method)
    student = request.student
    if isinstance(student, Auto):
        return {} if student.compression is None else {"target_compression": _half_way(student.compression)}
    if isinstance(student, Given) or student.width >= 1:
        return {}
    return {"width": round((1 + student.width) / 2, 4)}


def _more_of_each_layer(method: Factorization) -> dict[str, Any]:
    """The goal of a factorization that leaves more of the model: half of the way to all of it."""
    if method.compression is not None:
        return {"target_compression": _half_way(method.compression)}
    if method.rank is not None:
        return {"rank": 2 * method.rank}
    name, share = ("energy", method.energy) if method.energy is not None else ("rank_ratio", method.rank_ratio)
    return {} if share is None or share >= MOST_KEPT else {name: round((1 + share) / 2, 4)}


def _smaller_amount(request: PruneRequest, result: Result) -> dict[str, Any]:
    method = request.method
    if request.amounts is not None:
        return {}
    if isinstance(method, Structured):
        if method.target_macs_ratio is not None:
            return {"target_macs_ratio": _half_way(method.target_macs_ratio)}
        if method.target_speedup is not None:
            return {"target_speedup": _half_way(method.target_speedup)}
        if method.target_latency_ms is not None:
            return {}
    if request.goal is None or _cut_short(result):  # the kept round is the smaller goal, and it is there
        return {}
    name = "pruning_ratio" if isinstance(method, Structured) else "sparsity"
    return {name: round(request.goal / 2, 4)}


def _half_way(ratio: float) -> float:
    """A ratio half of the way from 1, on the scale of its logarithm."""
    return round(max(1.01, float(ratio**0.5)), 2)


def _why_smaller(request: Reshaping) -> str:
    return "a larger student keeps more" if isinstance(request, DistillRequest) else "a smaller goal loses less"
