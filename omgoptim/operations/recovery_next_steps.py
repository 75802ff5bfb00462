"""Next steps after prune, factorize and distill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import common_arguments, result_arguments, same_arguments, step
from omgoptim.operations.verdict import holds
from omgoptim.reports import Gains, NextStep, Round, Training
from omgoptim.requests import DistillRequest, FactorizeRequest, PruneRequest, verb_of
from omgoptim.requests.distill import Auto, Given
from omgoptim.requests.factorize import Factorization
from omgoptim.requests.prune import Structured

ModuleRequest = PruneRequest | FactorizeRequest | DistillRequest
"""Request of a verb that changes and trains a module."""

MAX_EPOCHS, MAX_ROUNDS, MAX_LAYER_RATIO = 10_000, 100, 0.97
"""Bounds of suggested arguments; the first two are those of the requests. The last is chosen: a layer keeps a few
channels."""

MAX_KEPT = 0.99
"""Share of a layer, or of its energy, up to which a factorization that keeps more is suggested: two factors of nearly
full rank are larger than the weight. Chosen."""

MIN_SUGGESTED_SPEEDUP = 1.1
"""Minimum speedup that is suggested as a target; less is within the noise of a quick timing (`AS_FAST_ONCE`)."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """Measurements of a run that decide its next steps."""

    outcome: str
    run_id: str
    gains: Gains
    missed: bool = False
    """True if the goal was missed."""
    rounds: Sequence[Round] = ()
    training: Training | None = None


def next_steps(request: ModuleRequest, loaded: LoadedModel, result: RunResult) -> list[NextStep]:
    """Suggest steps for a failed goal or guard, and the following technique."""
    steps: list[NextStep] = []
    again = result_arguments(request, result.run_id)
    failed = result.outcome == "guard_failed"
    if failed and _missed_speed(request, result):
        steps += _reachable_speed(request, result, loaded)
    elif failed:
        steps += _steps_to_lose_less(request, loaded, result)
    single_weights = isinstance(request, PruneRequest) and not isinstance(request.method, Structured)
    slower = result.gains.speedup_low is None or result.gains.speedup_low <= 1
    if single_weights and slower and not failed:
        why = "zeros do not make a dense engine faster; structured pruning does"
        steps.append(step("prune", common_arguments(request) | _guard(request) | {"method": "structured"}, why))
    if not failed or result.missed:
        why = "quantization follows, and the gains multiply"
        steps.insert(0 if failed else len(steps), step("quantize", again, why))
    if result.outcome == "ok" and len(steps) < 3:
        why = "shows the time by layer of the artifact"
        steps.append(step("profile", again, why))
    return steps[:3]


def _guard(request: ModuleRequest) -> dict[str, Any]:
    """Return the given quality guard, which is about the same original in another verb."""
    default = type(request).model_fields["max_quality_drop"].default
    return {} if request.max_quality_drop == default else {"max_quality_drop": request.max_quality_drop}


def _missed_speed(request: ModuleRequest, result: RunResult) -> bool:
    """Return whether a time target was missed although the guard passed and every round was kept."""
    if not isinstance(request, PruneRequest) or not isinstance(request.method, Structured):
        return False
    in_time = request.method.target_speedup is not None or request.method.target_latency_ms is not None
    return in_time and result.missed and not _cut_short(result) and _passed_guard(request, result)


def _cut_short(result: RunResult) -> bool:
    """Return whether an earlier round than the last is the artifact."""
    return bool(result.rounds) and not result.rounds[-1].kept


def _passed_guard(request: ModuleRequest, result: RunResult) -> bool:
    drop = result.gains.quality_drop
    return drop is not None and holds(drop, request.max_quality_drop)


def _reachable_speed(request: ModuleRequest, result: RunResult, loaded: LoadedModel) -> list[NextStep]:
    """Suggest steps for an unreachable speed: wider limits, a student, or the nearest speed.

    Training is not among them, since it does not change the time.
    """
    assert isinstance(request, PruneRequest)
    assert isinstance(request.method, Structured)
    given = same_arguments(request)
    steps = []
    if request.method.max_layer_ratio < MAX_LAYER_RATIO or request.method.round_to != 1:
        limits = {"max_layer_ratio": max(MAX_LAYER_RATIO, request.method.max_layer_ratio), "round_to": 1}
        why = "the narrowest allowed widths are too slow; these limits allow narrower ones"
        steps.append(step("prune", given | limits, why))
    target_speedup, reached = request.method.target_speedup, result.gains.speedup
    if target_speedup is not None and loaded.data.real:
        why = "a student of another architecture can be faster than this model at its narrowest widths"
        student = common_arguments(request) | _guard(request) | {"student": "auto", "target_speedup": target_speedup}
        steps.append(step("distill", student, why))
    if reached is not None and reached >= MIN_SUGGESTED_SPEEDUP:
        goal = {name: value for name, value in given.items() if name not in ("target_speedup", "target_latency_ms")}
        nearest = int(reached * 0.97 * 100) / 100
        steps.append(
            step("prune", goal | {"target_speedup": nearest}, f"{nearest:g}x is the nearest reachable speedup")
        )
    return steps


def _steps_to_lose_less(request: ModuleRequest, loaded: LoadedModel, result: RunResult) -> list[NextStep]:
    """Suggest steps for a failed guard: data, more training, smaller rounds, or a smaller goal."""
    verb, given = verb_of(request), same_arguments(request)
    if not loaded.data.real:
        known = {key: value for key, value in given.items() if key != "inputs"} | {"data": "file.py:load"}
        return [step(verb, known, "fine-tuning recovers quality and needs data")]
    epochs = 1 if request.epochs is None else request.epochs
    steps = []
    if _still_improving(result.training) and epochs < MAX_EPOCHS:
        why = "quality still rose in the last epoch: longer training recovers more"
        if result.training is None:
            why = "nothing was trained: fine-tuning recovers quality"
        steps.append(step(verb, given | {"epochs": min(MAX_EPOCHS, max(2, 2 * epochs))}, why))
    if isinstance(request, PruneRequest) and request.amounts is None and request.goal is not None:
        rounds = min(MAX_ROUNDS, max(3, 2 * request.rounds))
        if rounds > request.rounds:
            why = "several smaller rounds with fine-tuning lose less than one large round"
            steps.append(step(verb, given | {"rounds": rounds, "epochs": max(1, epochs)}, why))
    smaller = _smaller_goal(request, result)
    if smaller:
        steps.append(step(verb, given | smaller, _why_smaller(request)))
    return steps


def _still_improving(training: Training | None) -> bool:
    """Return whether more training may help: the last epoch was the best, or nothing was trained."""
    if training is None or not training.epochs:
        return True
    of_last = [epoch for epoch in training.epochs if epoch.round == training.epochs[-1].round]
    return of_last[-1].best


def _smaller_goal(request: ModuleRequest, result: RunResult) -> dict[str, Any]:
    """Return a smaller goal, half of the way; empty where there is none."""
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
    """Return the goal of a milder factorization: half of the way to the whole model."""
    if method.compression is not None:
        return {"target_compression": _half_way(method.compression)}
    if method.rank is not None:
        return {"rank": 2 * method.rank}
    name, share = ("energy", method.energy) if method.energy is not None else ("rank_ratio", method.rank_ratio)
    return {} if share is None or share >= MAX_KEPT else {name: round((1 + share) / 2, 4)}


def _smaller_amount(request: PruneRequest, result: RunResult) -> dict[str, Any]:
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
    if request.goal is None or _cut_short(result):  # the kept round is the artifact of a smaller goal already
        return {}
    name = "pruning_ratio" if isinstance(method, Structured) else "sparsity"
    return {name: round(request.goal / 2, 4)}


def _half_way(ratio: float) -> float:
    """Return the square root of a ratio, at least 1.01."""
    return round(max(1.01, float(ratio**0.5)), 2)


def _why_smaller(request: ModuleRequest) -> str:
    return (
        "a larger student keeps more quality"
        if isinstance(request, DistillRequest)
        else "a smaller goal loses less quality"
    )
