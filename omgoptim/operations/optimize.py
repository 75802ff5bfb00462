"""optimize: quantize; compress as far as the guard allows and quantize that; measure and deliver the best."""

from __future__ import annotations

import math
import time

from omgoptim.errors import RequestError, argument
from omgoptim.measure.timing import PLANS
from omgoptim.models.manifest import Manifest
from omgoptim.operations.baseline import at_exportable_batch, original_on_target
from omgoptim.operations.context import RunContext, Stage
from omgoptim.operations.execution import is_parallel, refuse_unreachable
from omgoptim.operations.final_measurement import SPAN, guard_reasons, measure_finalists
from omgoptim.operations.final_report import final_report, save_finalists
from omgoptim.operations.goal import Goal
from omgoptim.operations.ledger import Ledger
from omgoptim.operations.loaded_model import Live, LoadedModel, refuse_quantized
from omgoptim.operations.next_steps import pick_step, result_arguments, same_arguments, step
from omgoptim.operations.optimization.chain import SHORT_EPOCHS, UNTRAINED, UNTRAINED_SHARE, StepChain, quantize_alone
from omgoptim.operations.optimization.cost import FINAL_SHARE, StepTimes, epoch_seconds, measured_once
from omgoptim.operations.optimization.final_choice import (
    FINALISTS,
    Chosen,
    DeliveryOrder,
    Finalist,
    pick_finalists,
)
from omgoptim.operations.optimization.floors import measure_floors, refuse_below, refuse_size
from omgoptim.operations.optimization.level_speeds import LevelSpeeds, measure_levels
from omgoptim.operations.optimization.parallel_steps import train_in_parallel
from omgoptim.operations.optimization.plan import plan_report
from omgoptim.operations.optimization.points import StepResult
from omgoptim.operations.optimization.selection_data import (
    identity_of,
    selection_as_evaluation,
    train_problem,
    weights_identity,
)
from omgoptim.operations.optimization.steps import Steps
from omgoptim.operations.output_folder import free_output, with_output
from omgoptim.operations.prepare import prepare
from omgoptim.operations.quantization.selection import Preference
from omgoptim.operations.timing import OVERLOADED
from omgoptim.operations.verdict import (
    passes,
    quality_sentence,
    size_phrase,
    speed_phrase,
)
from omgoptim.reports import EfficiencyReport, NextStep
from omgoptim.requests import OptimizeRequest

LEDGER = "ledger.jsonl"


def optimize(request: OptimizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Make a model smaller and faster within a guard and a time budget. See `OptimizeRequest`."""
    began = time.monotonic()
    output = free_output(request, context)
    live = live or Live()
    refuse_unreachable(request, live)
    loaded = original_on_target(prepare(request, context, live), context)
    load_s = time.monotonic() - began
    refuse_quantized(request, loaded)
    loaded = at_exportable_batch("onnxruntime" if request.runtime == "auto" else request.runtime, loaded, context)
    goal = Goal.of(request)
    data = selection_as_evaluation(loaded.data)  # refuses data that cannot be divided, before any step
    problem = "a program cannot be trained" if loaded.module is None else train_problem(data)
    refuse_size(goal, loaded, problem)
    floors, launch_s = measure_floors(loaded, context, request.runtime)
    refuse_below(goal, floors)

    def measure() -> StepTimes:
        trained_began = time.monotonic()
        epoch_s = None if problem else epoch_seconds(loaded, data, request.time_limit_s)
        prepared_s = load_s + launch_s * len(floors) + time.monotonic() - trained_began
        return StepTimes(prepared_s, load_s, launch_s, epoch_s)

    cost = measured_once(context.checkpoints / "cost.json", StepTimes, measure)
    _refuse_short(request, cost)
    if request.plan:
        return plan_report(request, context, loaded, floors, cost, problem)
    steps = Steps(
        request,
        context,
        live,
        Ledger(context.folder / LEDGER),
        (1 - FINAL_SHARE) * 60 * request.budget_minutes - cost.prepared_s,
        model=weights_identity(loaded),
        data=identity_of(loaded.data),
    )
    preference = Preference(request.prefer, Manifest.read(loaded.baseline).size_bytes)
    points, singles = _points(steps, goal, cost, problem, loaded, preference)
    left_s = steps.seconds_left + FINAL_SHARE * 60 * request.budget_minutes
    finalists = pick_finalists(points, goal, preference, singles, cost.finalists(left_s, FINALISTS))
    stage = Stage(context, "measuring the finalists against the original", SPAN)
    chosen = measure_finalists(request, loaded, finalists, DeliveryOrder(loaded, goal, preference), stage, left_s)
    for point in chosen.winner.entry.chain:
        point.status = "kept"
    for point in steps.taken:
        if point.status != "kept":
            point.why = _why_not(point, goal)
    reports = {one.slug: _report(request, steps, chosen, one) for one in chosen.finalists}
    return with_output(save_finalists(chosen, reports), context.artifact, output)


def _points(
    steps: Steps, goal: Goal, cost: StepTimes, problem: str | None, loaded: LoadedModel, preference: Preference
) -> tuple[list[StepResult], list[StepResult]]:
    """Take the steps; return all of their results, and those of quantization alone.

    Args:
        steps: takes and records the steps.
        goal: the guard and the targets.
        cost: measured seconds of a launch and of an epoch.
        problem: why nothing can be trained; None where it can.
        loaded: the original.
        preference: order by time and size.

    Raises:
        RequestError: no step gave a result.
    """
    alone = quantize_alone(steps)
    if problem is None:
        chain = StepChain(steps, goal, cost, preference, _level_speeds(steps, cost, loaded, alone, preference))
        if is_parallel(steps.request):
            train_in_parallel(steps, chain.compared(), loaded.source.artifact)
        chain.build()
    else:
        steps.skip("prune or distill", "prune", problem)
    singles = [alone, *steps.alternatives(alone)] if alone else []
    others = [point for point in steps.taken if point is not alone]
    points = [*singles, *(one for point in others for one in (point, *steps.alternatives(point)))]
    if not points:
        reasons = [step for step in steps.without_result if step.status == "failed"] or steps.without_result
        fix = "`omgoptim runs list` (tool: runs, action list) shows the runs of the steps"
        raise RequestError("no step gave a result", f"{reasons[0].name}: {reasons[0].why}", fix)
    return points, singles


def _level_speeds(
    steps: Steps, cost: StepTimes, loaded: LoadedModel, alone: StepResult | None, preference: Preference
) -> LevelSpeeds:
    """Measure the levels untrained, within their share of the budget, which is charged for it.

    Nothing is measured where no time would be left to train and quantize one of them.
    """
    limit_s = UNTRAINED_SHARE * 60 * steps.request.budget_minutes
    needed_s = cost.trained_s(steps.taken, SHORT_EPOCHS) + cost.quantize_s(steps.taken)
    if alone is None or steps.seconds_left < limit_s + needed_s:
        return LevelSpeeds()
    context, seed = steps.context, steps.request.seed
    speeds = measured_once(
        context.checkpoints / "levels.json",
        LevelSpeeds,
        lambda: measure_levels(loaded, alone, preference, seed, Stage(context, "levels", UNTRAINED), limit_s),
    )
    steps.budget_s -= speeds.seconds
    return speeds


def _why_not(point: StepResult, goal: Goal) -> str:
    if point.ruined:
        return "an output that the metric does not read was ruined on the selection samples"
    if point.cautious_drop <= goal.max_quality_drop:
        return "within the guard on the selection samples; the result builds on another step"
    margin = point.cautious_drop - point.drop
    words = f"a drop of {point.drop:.4f} on the selection samples"
    return f"{words}, {point.cautious_drop:.4f} with its margin" if margin > 0 else words


def _refuse_short(request: OptimizeRequest, cost: StepTimes) -> None:
    """Refuse a budget in which not even half of the first step would be done."""
    needed_s = cost.prepared_s + cost.quantize_s([]) + cost.final_s(PLANS[request.timing].launches)
    if 60 * request.budget_minutes < max(2 * cost.prepared_s, needed_s / 2):
        minutes = math.ceil(10 * max(needed_s, 2 * cost.prepared_s) / 60) / 10
        raise RequestError(
            f"a budget of {request.budget_minutes:g} minutes is too short",
            f"loading the model, quantizing it and the final measurement take about {needed_s:.0f} s",
            f"give {argument('budget_minutes', f'{minutes:g}')} at least; training a smaller model takes more",
        )


def _report(request: OptimizeRequest, steps: Steps, chosen: Chosen, one: Finalist) -> EfficiencyReport:
    """Return the report of a finalist as that of the run's artifact."""
    last = one.entry.run.report
    chain = [point.run.report for point in one.entry.chain]
    summary = " ".join([*chosen.leading_warnings(one, last.gains_by), _summary(chosen, one)])
    report = final_report(chosen, one, summary, parts=last.gains_by)
    return report.model_copy(
        update={
            "next_steps": _next_steps(request, chosen, one),
            "changed": [change for report in chain for change in report.changed],
            "skipped": last.skipped,
            "steps": steps.records(),
            "coverage": last.coverage if last.verb == "quantize" and one.entry.artifact.name == "artifact" else None,
            "lineage": [*Manifest.read(one.entry.artifact).lineage, chosen.context.run_id],
        }
    )


def _summary(chosen: Chosen, one: Finalist) -> str:
    became = f"{size_phrase(one.gains)}, {speed_phrase(one.gains)}"
    how = " -> ".join(point.name for point in one.entry.chain[:-1]) if len(one.entry.chain) > 1 else ""
    steps = f"{how} -> {one.entry.name}" if how else one.entry.name
    quality = quality_sentence(one.before, one.quality)
    outcome = chosen.outcome(one)
    if outcome == "guard_failed":
        reasons = "; ".join(guard_reasons(one, chosen.guard))
        return f"The goal was not met: {reasons}. The nearest result is {became}. Steps: {steps}. {quality}"
    first = "No gain. The best result is" if outcome == "no_gain" else "Optimized:"
    alone = _against_single(one, chosen)
    return f"{first} {became}. Steps: {steps}. {quality}{alone}"


def _against_single(one: Finalist, chosen: Chosen) -> str:
    """Return a sentence that compares the chain with the best quantization alone, from the same measurement."""
    singles = [other for other in chosen.finalists if other.entry.quantized_alone]
    if not singles or any(one is other for other in singles) or chosen.race.load > OVERLOADED:
        return ""
    best = singles[0]
    if best.gains.speedup is None or one.gains.speedup is None:
        return ""
    size = (best.after.size_bytes or 0) / (one.after.size_bytes or 1)
    return (
        f" Quantization alone ({best.entry.name}) reaches {best.gains.speedup:.2f}x the original's speed; this is "
        f"{one.gains.speedup / best.gains.speedup:.2f}x as fast and {size:.2f}x smaller."
    )


def _next_steps(request: OptimizeRequest, chosen: Chosen, one: Finalist) -> list[NextStep]:
    steps, guard, run_id = [], chosen.guard, chosen.context.run_id
    if chosen.outcome(one) == "guard_failed":
        holding = [other for other in chosen.finalists if other is not one and passes(other.quality, guard)]
        if holding and not passes(one.quality, guard):
            steps.append(pick_step(run_id, holding[0].slug, f"{holding[0].entry.name} passes the quality guard"))
        if request.budget_minutes < 240:
            longer = same_arguments(request) | {"budget_minutes": 3 * request.budget_minutes}
            steps.append(step("optimize", longer, "a larger budget trains longer and tries more compression levels"))
    else:
        steps.append(step("profile", result_arguments(request, run_id), "shows the time by layer of the artifact"))
    return steps
