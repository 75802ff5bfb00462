"""prune: take weights away round by round, train the rest back, and report the reopened artifact."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from omgoptim.errors import DataError, argument
from omgoptim.operations.compression_job import Job, applied
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import gather
from omgoptim.operations.loaded_model import Live, LoadedModel, prepare
from omgoptim.operations.output_folder import free_output
from omgoptim.operations.report_builder import build_report
from omgoptim.operations.rounds.checkpoint import Stage
from omgoptim.operations.rounds.final_model import Goal, final_model_of
from omgoptim.operations.rounds.loop import collapsed, keep, run_round
from omgoptim.operations.rounds.plan import plan_report
from omgoptim.operations.rounds.sensitivity import study
from omgoptim.operations.rounds.speed_target import SpeedGoal, reached, take_for_speed
from omgoptim.operations.save_and_measure import engine_for, require_module
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Params, PruneRequest
from omgoptim.requests.prune import SemiStructured, Structured, Unstructured
from omgoptim.techniques.prune._unstructured.schedule import levels
from omgoptim.techniques.registry import Outcome, technique_of


@dataclass(frozen=True, slots=True)
class Step:
    """What one round is to reach."""

    params: Params
    amount: float | None
    """Fraction taken away by the end of the round: of weights, channels, multiply-accumulates or time."""
    speed: SpeedGoal | None = None


def prune(request: PruneRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Remove weights and train the rest back. See `PruneRequest`."""
    output = free_output(request.output, request.allow_path, context)
    loaded = prepare(request, context, live)
    original = require_module(loaded, "prune")
    _refuse_without_data(request, loaded)
    context.progress("reading the training data", 0.08)
    datasets = gather(request, loaded, original, live)
    runtime = engine_for(request.runtime, loaded)
    steps = steps_of(request)
    job = Job(request, context, loaded, datasets, original, runtime, len(steps))
    if request.plan:
        return plan_report("prune", job, [step.params for step in steps])
    points = study(job, request.method) if request.sensitivity else []
    stages = _rounds(job, steps)
    kept = keep(job, stages)
    return build_report("prune", job, final_model_of(job, kept, _goal(request, kept.stage), points), output)


def steps_of(request: PruneRequest) -> list[Step]:
    """The rounds of a request, each with what it is to reach."""
    method = request.method
    if isinstance(method, SemiStructured):
        return [Step(method, None)]
    if isinstance(method, Unstructured):
        found = request.amounts or levels(request.schedule, method.sparsity, request.rounds)
        return [Step(method.model_copy(update={"sparsity": amount}), amount) for amount in found]
    assert isinstance(method, Structured)  # the union has no other
    if request.goal is not None:
        found = request.amounts or levels(request.schedule, method.goal, request.rounds)
        return [Step(method.model_copy(update={"pruning_ratio": amount}), amount) for amount in found]
    shares = levels(request.schedule, 1.0, request.rounds)
    if method.target_macs_ratio is not None:
        ratios = [method.target_macs_ratio**share for share in shares]
        return [Step(method.model_copy(update={"target_macs_ratio": ratio}), 1 - 1 / ratio) for ratio in ratios]
    goals = [SpeedGoal(method.target_speedup, method.target_latency_ms, share) for share in shares]
    return [Step(method, goal.amount, goal) for goal in goals]


def _refuse_without_data(request: PruneRequest, loaded: LoadedModel) -> None:
    """Raise a DataError where scores read off random inputs would mean nothing."""
    method = request.method
    needs = technique_of(method).needs_data or getattr(method, "score", "") == "wanda"
    scored = isinstance(method, Structured) and method.importance in ("taylor", "hessian")
    if (needs or scored) and not loaded.data.real:
        what = f"importance {method.importance}" if isinstance(method, Structured) else f"method {method.method}"
        raise DataError(
            f"{what} needs data",
            "it reads from real inputs which weights matter; none were given",
            f"give {argument('data', 'file.py:callable')}, or use magnitude, which needs none",
        )


def _rounds(job: Job[PruneRequest], steps: list[Step]) -> list[Stage]:
    """Every round until the last, or until one collapses."""
    stages: list[Stage] = []
    module = job.original
    for number, step in enumerate(steps, start=1):

        def take(copied: nn.Module, span: tuple[float, float], step: Step = step) -> Outcome:
            if step.speed is not None:
                try:
                    return take_for_speed(job, step.speed, step.params, copied.to(job.loaded.device), span)
                finally:
                    copied.cpu()
            job.context.progress(f"pruning, round {number} of {len(steps)}", span[0])  # noqa: B023  called in this turn
            return applied(job, copied, step.params, job.module_run(span))

        held = not isinstance(step.params, Structured)
        stages.append(run_round(job, number, step.amount, module, take, held))
        module = stages[-1].module
        if collapsed(job, stages[-1]):
            break
    return stages


def _goal(request: PruneRequest, kept: Stage) -> Goal:
    """The goal in words."""
    method = request.method
    if isinstance(method, SemiStructured):
        return Goal(f"{method.pattern} pruning by {method.score}")
    if isinstance(method, Unstructured):
        words = "Zeros make the file smaller; a dense engine multiplies them like any number."
        return Goal(f"{method.method} pruning at sparsity {kept.record.amount or method.sparsity:g}", facts=[words])
    assert isinstance(method, Structured)
    name = f"structured pruning by {method.importance}{_structured_words(method, kept)}"
    return Goal(name, missed=lambda measured: reached(method, measured))


def _structured_words(method: Structured, kept: Stage) -> str:
    if method.target_speedup is not None:
        return f" for {method.target_speedup:g}x the speed"
    if method.target_latency_ms is not None:
        return f" for {method.target_latency_ms:g} ms"
    if method.target_macs_ratio is not None:
        return f" for {method.target_macs_ratio:g}x fewer multiply-accumulates"
    return f", {kept.record.amount or method.goal:.3g} of the channels"
