"""prune: remove weights in rounds, fine-tune after each, and report the reopened artifact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from omgoptim.errors import DataError, argument
from omgoptim.operations.compression_job import Job, applied, open_job
from omgoptim.operations.context import RunContext
from omgoptim.operations.dry_run import plan_rounds
from omgoptim.operations.execution import refuse_unreachable
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.output_folder import free_output
from omgoptim.operations.report_builder import build_report
from omgoptim.operations.rounds.checkpoint import RoundState
from omgoptim.operations.rounds.loop import CompressionGoal, choose_round, collapsed, final_model_of, run_round
from omgoptim.operations.rounds.sensitivity import layer_sensitivity
from omgoptim.operations.rounds.speed_target import SpeedGoal, missed_speed, prune_to_speed
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Params, PruneRequest
from omgoptim.requests.prune import SemiStructured, Structured, Unstructured
from omgoptim.techniques.prune._unstructured.sparsity_allocation import round_targets
from omgoptim.techniques.registry import Outcome, technique_of


@dataclass(frozen=True, slots=True)
class PruningStep:
    """Target of one round."""

    params: Params
    amount: float | None
    """Fraction removed by the end of the round: of weights, channels, multiply-accumulates or time."""
    speed: SpeedGoal | None = None


def prune(request: PruneRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Prune a model and fine-tune it. See `PruneRequest`."""
    output = free_output(request, context)
    if request.sensitivity:
        refuse_unreachable(request, live)
    steps = steps_of(request)
    job = open_job(request, context, live, partial(_refuse_without_data, request))
    job = replace(job, rounds=len(steps))
    if request.plan:
        return plan_rounds(job, [step.params for step in steps])
    points = layer_sensitivity(job, request.method) if request.sensitivity else []
    states = _rounds(job, steps)
    kept = choose_round(job, states)
    return build_report(job, final_model_of(job, kept, partial(_goal, request), points), output)


def steps_of(request: PruneRequest) -> list[PruningStep]:
    """Return the rounds of a request, each with its target."""
    method = request.method
    if isinstance(method, SemiStructured):
        return [PruningStep(method, None)]
    if isinstance(method, Unstructured):
        found = request.amounts or round_targets(request.schedule, method.sparsity, request.rounds)
        return [PruningStep(method.model_copy(update={"sparsity": amount}), amount) for amount in found]
    assert isinstance(method, Structured)  # the union has no other
    if request.goal is not None:
        found = request.amounts or round_targets(request.schedule, method.goal, request.rounds)
        return [PruningStep(method.model_copy(update={"pruning_ratio": amount}), amount) for amount in found]
    shares = round_targets(request.schedule, 1.0, request.rounds)
    if method.target_macs_ratio is not None:
        ratios = [method.target_macs_ratio**share for share in shares]
        return [PruningStep(method.model_copy(update={"target_macs_ratio": ratio}), 1 - 1 / ratio) for ratio in ratios]
    goals = [SpeedGoal(method.target_speedup, method.target_latency_ms, share) for share in shares]
    return [PruningStep(method, goal.amount, goal) for goal in goals]


def _refuse_without_data(request: PruneRequest, loaded: LoadedModel) -> None:
    """Raise a DataError where importance would be computed on random inputs."""
    method = request.method
    needs = technique_of(method).needs_data or getattr(method, "score", "") == "wanda"
    scored = isinstance(method, Structured) and method.importance in ("taylor", "hessian")
    if (needs or scored) and not loaded.data.real:
        what = f"importance {method.importance}" if isinstance(method, Structured) else f"method {method.method}"
        raise DataError(
            f"{what} needs data",
            "the importance is computed on real inputs, and no data was given",
            f"give {argument('data', 'file.py:callable')}, or use magnitude, which needs no data",
        )


def _rounds(job: Job[PruneRequest], steps: list[PruningStep]) -> list[RoundState]:
    """Run all rounds, or until one collapses."""
    states: list[RoundState] = []
    module = job.original
    for number, step in enumerate(steps, start=1):

        def compress(copied: nn.Module, span: tuple[float, float], step: PruningStep = step) -> Outcome:
            if step.speed is not None:
                try:
                    return prune_to_speed(job, step.speed, step.params, copied.to(job.loaded.device), span)
                finally:
                    copied.cpu()
            job.context.progress(f"pruning, round {number} of {len(steps)}", span[0])  # noqa: B023  called in this iteration
            return applied(job, copied, step.params, job.module_run(span))

        keep_zeros = not isinstance(step.params, Structured)
        states.append(run_round(job, number, step.amount, module, compress, keep_zeros))
        module = states[-1].module
        if collapsed(job, states[-1]):
            break
    return states


def _goal(request: PruneRequest, kept: RoundState) -> CompressionGoal:
    """Return the goal with its description."""
    method = request.method
    if isinstance(method, SemiStructured):
        return CompressionGoal(f"{method.pattern} pruning by {method.score}")
    if isinstance(method, Unstructured):
        fact = "Zeros make the file smaller, but a dense engine no faster."
        return CompressionGoal(
            f"{method.method} pruning at sparsity {kept.record.amount or method.sparsity:g}", facts=[fact]
        )
    assert isinstance(method, Structured)
    name = f"structured pruning by {method.importance}{_structured_goal(method, kept)}"
    return CompressionGoal(name, missed=lambda measured: missed_speed(method, measured))


def _structured_goal(method: Structured, kept: RoundState) -> str:
    if method.target_speedup is not None:
        return f" for {method.target_speedup:g}x speed"
    if method.target_latency_ms is not None:
        return f" for {method.target_latency_ms:g} ms"
    if method.target_macs_ratio is not None:
        return f" for {method.target_macs_ratio:g}x fewer multiply-accumulates"
    return f", {kept.record.amount or method.goal:.3g} of the channels"
