"""quantize: propose candidates, make them, screen them cheaply, race the finalists, and report the reopened winner."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from omgoptim.errors import ArtifactError, RequestError
from omgoptim.measure.chance import chance_words
from omgoptim.measure.launch import Process
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import Quality, compare_quality, read_outputs
from omgoptim.measure.race import Timing
from omgoptim.operations.advice import quantize_steps, repeat_of
from omgoptim.operations.candidates import Program, Proposal, propose
from omgoptim.operations.context import RunContext
from omgoptim.operations.coverage_proof import coverage_warnings, prove, told_kernels
from omgoptim.operations.explain import explain
from omgoptim.operations.guard import repair, with_guard
from omgoptim.operations.making import Made, float_program, make
from omgoptim.operations.measured import artifact_record, environment, gains, measurement, output_records, shown_request
from omgoptim.operations.no_op import nothing_made
from omgoptim.operations.output import deliver, free_output
from omgoptim.operations.planning import plan_report
from omgoptim.operations.qat import TRAINED, Trained, train
from omgoptim.operations.screening import Attempt, choose_finalists, screen, within
from omgoptim.operations.splits import Splits, splits_of
from omgoptim.operations.subject import Live, Subject, prepare
from omgoptim.operations.timing import OVERLOADED, as_fast, full_race, told
from omgoptim.operations.verdict import (
    holds,
    load_warnings,
    outcome_of,
    quality_warnings,
    quality_words,
    verdict_words,
)
from omgoptim.reports import Candidate, Coverage, EfficiencyReport
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Qat
from omgoptim.runtimes.engine import Kernel


@dataclass(frozen=True, slots=True)
class Final:
    """The end of the race: who won, both timings, and the quality on the evaluation data."""

    winner: Attempt
    before: Timing
    after: Timing
    quality: Quality
    load: float
    scale: float
    """The winner's speedup measured in full over that of its screening, where the original may have been slow."""
    kernels: list[Kernel]
    """What the winner's engine ran, and in which numbers."""


def quantize(request: QuantizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Quantize a model and keep the fastest candidate that holds the guard. See `QuantizeRequest`."""
    output = free_output(request.output, request.allow_path, context)
    subject = prepare(request, context, live)
    if subject.precision.startswith("int"):
        raise RequestError(
            f"'{request.model}' is quantized already",
            f"its artifact is in {subject.precision}, and another rounding would only lose more",
            "quantize the float model that it was made from",
        )
    context.progress("exporting the model", 0.08)
    program = float_program(subject, context)
    proposal = propose(request, subject, program)
    if request.plan:
        return plan_report(request, context, subject, program, proposal)
    splits = splits_of(request, subject, proposal)
    trained: Trained | None = None
    if isinstance(request.scheme, Qat):
        trained = train(request, request.scheme, context, subject, program, splits, live)
        subject, program = trained.subject, trained.program
        splits.notes.extend(trained.warnings)
    attempts = _make_all(request, context, subject, program, proposal, splits)
    yardstick = screen(request, context, subject, attempts, splits.selection)
    guarded = repair(request, context, subject, program, attempts, splits, yardstick)
    finalists = choose_finalists(attempts, request.max_quality_drop)
    final = _final_race(request, context, subject, finalists)
    final.winner.status, final.winner.why = "chosen", "the fastest of the finalists, or as fast and smaller"
    if not within(final.winner, request.max_quality_drop):
        final.winner.why = "no candidate held the guard on the selection samples; this one came closest"
    context.progress("saving the artifact", 0.97)
    _publish(final.winner, context)
    explanation = None
    if request.explain and yardstick is not None:
        explanation = explain(
            request, context, subject, program, attempts, final.winner, guarded, splits.calibration, yardstick
        )
    place, untold = deliver(
        context.artifact, output, holds(final.quality.drop, request.max_quality_drop) and not final.quality.ruined
    )
    splits.notes.extend(untold)
    option, outcome = final.winner.made.option, final.winner.made.outcome
    skipped = outcome.skipped if outcome else []
    coverage = prove(
        *(program.path, subject.module, context.artifact, option.scheme, skipped, final.kernels),
        precision=subject.precision,
        macs=subject.macs.by_path if subject.macs else None,
    )
    splits.notes.extend(coverage_warnings(coverage, option.runtime))
    report = _report(request, context, subject, proposal, attempts, final, splits.notes, place, trained, coverage)
    return with_guard(report, request, guarded, final.winner).model_copy(update={"explanation": explanation})


def _make_all(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    program: Program,
    proposal: Proposal,
    splits: Splits,
) -> list[Attempt]:
    """Every proposed candidate's artifact. If none could be made, the first one's reason is the error."""
    attempts = []
    twins: dict[str | None, Made] = {}
    for index, option in enumerate(proposal.options):
        start = TRAINED if isinstance(request.scheme, Qat) else 0.1
        context.progress(f"making {option.name}", start + (0.35 - start) * index / len(proposal.options))
        key = None if option.on_module else option.params.model_dump_json()
        made = make(
            option, subject, program, splits.calibration, context, request.seed, twins.get(key) if key else None
        )
        if key and made.folder:
            twins.setdefault(key, made)
        attempts.append(Attempt(made, error=made.error))
    if all(attempt.error for attempt in attempts):
        raise nothing_made([(a.made.option.name, a.error) for a in attempts if a.error], request)
    return attempts


def _final_race(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    finalists: list[Attempt],
) -> Final:
    """Baseline and finalists in full: the fastest wins, and its quality comes from the evaluation data."""
    targets = [context.work / "final" / str(index) for index in range(len(finalists) + 1)]
    kernels: list[list[Kernel]] = [[] for _ in targets]

    def outputs(index: int, process: Process) -> None:
        whose = ["the original", *(attempt.made.option.name for attempt in finalists)][index]
        process.run_samples(subject.eval_folder, targets[index], told(context, f"evaluating {whose}"))
        kernels[index] = told_kernels(process) if index else []

    folders = [attempt.made.folder for attempt in finalists if attempt.made.folder]
    names = ", ".join(attempt.made.option.name for attempt in finalists)
    doing = f"measuring {names} against the original"
    raced = full_race(
        [subject.baseline, *folders], subject.bench, request.timing, request.seed, context, (0.55, 0.95), doing, outputs
    )
    finished = []
    screened = {attempt.made.option.name: attempt.speedup for attempt in finalists}
    for attempt, timing, target in zip(finalists, raced.timings[1:], targets[1:], strict=True):
        if isinstance(timing, Timing):
            attempt.timing = timing
            finished.append((attempt, timing, target))
        else:
            attempt.status, attempt.why, attempt.error = "failed", f"{timing.what}: {timing.why}", timing
    if not finished:
        raise next(attempt.error for attempt in finalists if attempt.error)
    fastest = max(attempt.speedup for attempt, _, _ in finished)
    factor = as_fast(finished[0][1], raced.load)
    level = [entry for entry in finished if entry[0].speedup * factor >= fastest]
    winner, timing, target = min(level, key=lambda entry: entry[0].made.size_bytes or 0)
    scale = winner.speedup / (screened[winner.made.option.name] or winner.speedup)
    for attempt, _, _ in finished:
        attempt.why = f"{attempt.speedup / winner.speedup:.0%} of the speed of the chosen one, measured in full"
    original = read_outputs(targets[0])
    metric = resolve_metric(
        subject.metric,
        subject.signature,
        original,
        subject.evaluation.targets,
        subject.reach,
        request.time_limit_s,
        subject.outputs,
    )
    quality = compare_quality(metric, original, read_outputs(target), subject.evaluation.targets, request.seed)
    return Final(winner, raced.timing(0), timing, quality, raced.load, scale, kernels[finalists.index(winner) + 1])


def _publish(winner: Attempt, context: RunContext) -> None:
    """The winner's folder becomes the run's artifact in one rename."""
    if winner.made.folder is None:
        raise ArtifactError("the chosen candidate has no artifact")
    os.replace(winner.made.folder, context.artifact)


def _record(attempt: Attempt, baseline_bytes: int, sizes: dict[str, int], final: Final) -> Candidate:
    """A candidate as the report has it; without its speedup if the machine was too busy for one to be told. What was
    only screened is told on the scale of the full measurement: the time of the original cancels out."""
    trusted = final.load <= OVERLOADED
    scale = 1.0 if attempt.status in ("chosen", "finalist") else final.scale
    option = attempt.made.option
    size = sizes.get(option.name)
    return Candidate(
        name=option.name,
        scheme=option.scheme,
        runtime=option.runtime,
        size_bytes=size,
        size_ratio=baseline_bytes / size if size else None,
        speedup=(attempt.speedup * scale or None) if trusted else None,
        quality=attempt.quality,
        quality_drop=attempt.drop,
        status=attempt.status,
        why=attempt.why,
    )


def _report(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    proposal: Proposal,
    attempts: list[Attempt],
    final: Final,
    notes: list[str],
    place: Path,
    trained: Trained | None = None,
    coverage: Coverage | None = None,
) -> EfficiencyReport:
    """The report of a finished run, whose artifact is at `place`."""
    winner, quality = final.winner, final.quality
    before = measurement(
        subject.baseline, final.before, subject.bench, quality.before, quality.metric, subject.evaluation.count
    )
    after = measurement(
        context.artifact, final.after, subject.bench, quality.after, quality.metric, subject.evaluation.count
    )
    gained = gains(before, after, final.after, quality, final.load)
    guard, name = request.max_quality_drop, winner.made.option.name
    outcome = outcome_of(gained, quality, guard)
    sizes = {a.made.option.name: size for a in attempts if a is not winner and (size := a.made.size_bytes)}
    sizes[name] = after.size_bytes or 0
    real = subject.data.real
    needed = None if quality.decided(guard) else quality.samples_to_decide(guard)
    made = winner.made.outcome
    told_of = [chance_words(quality.metric, quality.before, subject.evaluation.targets)]
    told_of += [verdict_words(outcome, name, gained, quality, guard), quality_words(before, quality)]
    told_of += [trained.fact] if trained else []
    told_of += made.notes if made else []
    return EfficiencyReport(
        outcome=outcome,
        summary=" ".join(part for part in told_of if part),
        warnings=[*subject.notes, *notes, *quality_warnings(quality, guard, real), *load_warnings(final.load)],
        next_steps=quantize_steps(request, outcome, context.run_id, gained.speedup_low is not None, needed, subject),
        verb="quantize",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, subject.bench, request.seed, subject.device, final.load),
        before=before,
        after=after,
        gains=gained,
        outputs=output_records(subject.outputs, quality),
        changed=made.changed if made else [],
        skipped=made.skipped if made else [],
        training=trained.training if trained else None,
        candidates=[
            *(_record(attempt, before.size_bytes or 0, sizes, final) for attempt in sorted(attempts, key=_rank)),
            *proposal.passed_over,
        ],
        coverage=coverage,
        macs_check=subject.macs.check if subject.macs else None,
        artifact=artifact_record(place),
        lineage=list(subject.lineage),
        repeat=repeat_of("quantize", request),
    )


def _rank(attempt: Attempt) -> tuple[int, float]:
    return ("chosen", "finalist", "dropped", "failed").index(attempt.status), -attempt.speedup
