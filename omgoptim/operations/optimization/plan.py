"""`plan` of optimize: the steps that would be taken, and targets below the lower bounds. Nothing is built."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.measure.timing import PLANS
from omgoptim.operations.context import RunContext
from omgoptim.operations.dry_run import dry_run_report
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.chain import (
    DISTILL,
    FIRST_LEVEL,
    LEVELS,
    LEVELS_SHARE,
    MARGIN,
    MOST_EPOCHS,
    PRUNE,
    RECOVERY_SHARE,
    SECOND_ROUTE_SHARE,
    SHORT_EPOCHS,
    UNTRAINED_SHARE,
)
from omgoptim.operations.optimization.cost import FINAL_SHARE, StepTimes
from omgoptim.operations.optimization.floors import Floor
from omgoptim.operations.optimization.level_speeds import LEVELS as UNTRAINED_LEVELS
from omgoptim.reports import EfficiencyReport, Step
from omgoptim.requests import OptimizeRequest


def plan_report(
    request: OptimizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    floors: Sequence[Floor],
    cost: StepTimes,
    problem: str | None,
) -> EfficiencyReport:
    """Return the plan as a report, with the minutes that each step would take.

    Args:
        request: of the run.
        context: of the run.
        loaded: the original.
        floors: costs of an empty graph on each engine.
        cost: measured seconds of a launch and of an epoch.
        problem: why nothing can be trained; None where it can.
    """
    steps = _planned_steps(request, cost, problem)
    final_s = cost.final_s(PLANS[request.timing].launches)
    total_s = cost.prepared_s + final_s + sum(step.expected_seconds or 0.0 for step in steps)
    summary = (
        f"Dry run: about {max(1, round(total_s / 60))} of {request.budget_minutes:g} minutes, of "
        f"which the final measurement takes about {final_s:.0f} s. The guard is a drop of "
        f"{request.max_quality_drop:g}. Evaluation data is read once, at the end.{_floor_sentence(floors)}"
    )
    return dry_run_report(request, context, loaded, summary).model_copy(update={"steps": steps})


def _planned_steps(request: OptimizeRequest, cost: StepTimes, problem: str | None) -> list[Step]:
    """Return the steps that fit the budget; without training where `problem` says why there is none."""
    quantize_s, short_s = cost.quantize_s([]), cost.trained_s([], SHORT_EPOCHS)
    left_s = 60 * request.budget_minutes * (1 - FINAL_SHARE) - cost.prepared_s - quantize_s
    alone = _planned("quantize", "quantize", "all schemes and engines that this machine can run", quantize_s)
    if problem is not None or left_s <= short_s + quantize_s:
        why = problem or f"no time: one training and quantizing take {short_s + quantize_s:.0f} s"
        return [alone, Step(name="prune or distill", verb="prune", status="skipped", why=why)]
    probe_s = min(UNTRAINED_SHARE * 60 * request.budget_minutes, 3 * (len(UNTRAINED_LEVELS) + 1) * cost.launch_s)
    words = f"up to {len(UNTRAINED_LEVELS)} compression levels pruned, quantized and timed without training"
    untrained = _planned("untrained levels", "prune", words, probe_s)
    return [alone, untrained, *_planned_trainings(cost, left_s - probe_s)]


def _planned_trainings(cost: StepTimes, left_s: float) -> list[Step]:
    """Return the steps that train within `left_s` seconds, and the quantization of their result."""
    quantize_s, short_s = cost.quantize_s([]), cost.trained_s([], SHORT_EPOCHS)
    routes = (PRUNE, DISTILL) if short_s <= SECOND_ROUTE_SHARE * (left_s - short_s) else (PRUNE,)
    why = "one short training; the better of the two continues" if len(routes) > 1 else "one short training"
    steps = [
        _planned(f"{route.name} {FIRST_LEVEL:.0%}", route.verb, why, short_s, route.work_ratio(FIRST_LEVEL))
        for route in routes
    ]
    left_s -= len(routes) * short_s
    kept_s = cost.trained_s([], 2 * SHORT_EPOCHS) + quantize_s
    spare_s = min(LEVELS_SHARE * left_s, left_s - MARGIN * kept_s)
    levels = max(0, min(LEVELS, int(spare_s / max(short_s, 0.01))))
    verb = "prune or distill" if len(routes) > 1 else "prune"
    if levels:
        deeper = f"at most {levels} further compression levels, bisecting to the guard"
        steps.append(_planned("levels", verb, deeper, levels * short_s))
        left_s -= levels * short_s
    most_s = max(cost.trained_s([], 2 * SHORT_EPOCHS), RECOVERY_SHARE * (left_s - quantize_s))
    full_s = min(cost.trained_s([], MOST_EPOCHS), most_s)
    if full_s + quantize_s <= left_s:
        full = f"the highest compression level expected to pass the guard, up to {MOST_EPOCHS} epochs"
        steps.append(_planned("full recovery", verb, full, full_s))
    return [*steps, _planned("quantize again", "quantize", "the fine-tuned model", quantize_s)]


def _planned(name: str, verb: str, why: str, seconds: float, speedup: float | None = None) -> Step:
    return Step(
        name=name, verb=verb, status="planned", why=why, expected_seconds=round(seconds), expected_speedup=speedup
    )


def _floor_sentence(floors: Sequence[Floor]) -> str:
    lowest = min(floors, key=lambda floor: floor.latency_ms, default=None)
    if lowest is None:
        return ""
    return f" An empty graph takes {lowest.latency_ms:.3g} ms on {lowest.runtime}: no model is faster here."
