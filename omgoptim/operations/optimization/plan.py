"""`plan` of optimize: the steps that would be taken, and what the floors rule out. Nothing is made."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import repeat_of, step
from omgoptim.operations.optimization.chain import DISTILL, FIRST_LEVEL, LEVELS, MOST_EPOCHS, PRUNE
from omgoptim.operations.optimization.floors import Floor
from omgoptim.operations.report_records import environment, shown_request
from omgoptim.reports import EfficiencyReport, Step
from omgoptim.requests import OptimizeRequest


def plan_report(
    request: OptimizeRequest, context: RunContext, loaded: LoadedModel, floors: Sequence[Floor], has_train: bool
) -> EfficiencyReport:
    """Return the plan as a report."""
    steps = [Step(name="quantize", verb="quantize", status="planned", why="every scheme and engine that fits")]
    if has_train:
        for route in (PRUNE, DISTILL):
            why = "one short training: the better of the two goes on"
            expected = route.speedup(FIRST_LEVEL)
            name = f"{route.name} {FIRST_LEVEL:.0%}"
            steps.append(Step(name=name, verb=route.verb, status="planned", why=why, expected_speedup=expected))
        deeper = f"at most {LEVELS} further levels, by bisection to the guard"
        full = f"the deepest level that promises to hold the guard, up to {MOST_EPOCHS} epochs"
        steps.append(Step(name="levels", verb="prune or distill", status="planned", why=deeper))
        steps.append(Step(name="full recovery", verb="prune or distill", status="planned", why=full))
        steps.append(Step(name="quantize again", verb="quantize", status="planned", why="what was recovered"))
    else:
        why = "there is no train split: nothing is pruned or distilled without one"
        steps.append(Step(name="prune or distill", verb="prune", status="skipped", why=why))
    lowest = min(floors, key=lambda floor: floor.latency_ms, default=None)
    floor_words = ""
    if lowest is not None:
        floor_words = f" An empty graph takes {lowest.latency_ms:.3g} ms on {lowest.runtime}: no model is faster here."
    summary = (
        f"{len(steps)} steps within {request.budget_minutes:g} minutes; the guard is a drop of "
        f"{request.max_quality_drop:g}. Evaluation data is read once, at the end.{floor_words}"
    )
    arguments = {"model": request.model, "data": request.data, "max_quality_drop": request.max_quality_drop}
    run = step("optimize", {name: value for name, value in arguments.items() if value is not None}, "do it")
    return EfficiencyReport(
        outcome="ok",
        summary=summary,
        warnings=loaded.notes,
        next_steps=[run],
        verb="optimize",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, None),
        steps=steps,
        lineage=list(loaded.lineage),
        repeat=repeat_of("optimize", request),
    )
