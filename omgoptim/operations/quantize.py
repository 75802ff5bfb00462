"""quantize: propose candidates, make them, screen them cheaply, race the finalists, and report the reopened winner."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from omgoptim.errors import ArtifactError, DataError, RequestError, TechniqueError
from omgoptim.measure.launch import Process
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import Quality, compare_quality, read_outputs
from omgoptim.measure.race import Timing
from omgoptim.models.samples import Samples
from omgoptim.operations.advice import quantize_steps, repeat_of
from omgoptim.operations.candidates import Program, Proposal, propose
from omgoptim.operations.context import RunContext
from omgoptim.operations.making import Made, float_program, make
from omgoptim.operations.measured import artifact_record, environment, gains, measurement, shown_request
from omgoptim.operations.output import deliver, free_output
from omgoptim.operations.overlap import overlap_notes
from omgoptim.operations.planning import plan_report
from omgoptim.operations.screening import Attempt, choose_finalists, screen, within
from omgoptim.operations.subject import Live, Subject, prepare
from omgoptim.operations.timing import OVERLOADED, full_race, told
from omgoptim.operations.verdict import (
    holds,
    load_warnings,
    outcome_of,
    quality_warnings,
    quality_words,
    verdict_words,
)
from omgoptim.reports import Candidate, EfficiencyReport
from omgoptim.requests import QuantizeRequest
from omgoptim.techniques.registry import technique_of

AS_FAST = 1.02
"""Finalists within this factor of the fastest count as equally fast: the smallest of them wins."""

SELECTION_SAMPLES = 256
"""Samples that candidates are chosen on."""


@dataclass(frozen=True, slots=True)
class Splits:
    """What calibrates and what selects; neither is evaluation data."""

    calibration: Samples
    selection: Samples
    notes: list[str] = field(default_factory=list)


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


def quantize(request: QuantizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Quantize a model and keep the fastest candidate that holds the guard. See `QuantizeRequest`."""
    output = free_output(request.output, request.allow_path, context)
    subject = prepare(request, context, live)
    if subject.precision.startswith("int8"):
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
    splits = _splits(request, subject, proposal)
    attempts = _make_all(request, context, subject, program, proposal, splits)
    screen(request, context, subject, attempts, splits.selection)
    finalists = choose_finalists(attempts, request.max_quality_drop)
    final = _final_race(request, context, subject, finalists)
    final.winner.status, final.winner.why = "chosen", "the fastest of the finalists, or as fast and smaller"
    if not within(final.winner, request.max_quality_drop):
        final.winner.why = "no candidate held the guard on the selection samples; this one came closest"
    context.progress("saving the artifact", 0.97)
    _publish(final.winner, context)
    place, untold = deliver(context.artifact, output, holds(final.quality.drop, request.max_quality_drop))
    splits.notes.extend(untold)
    return _report(request, context, subject, proposal, attempts, final, splits.notes, place)


def _splits(request: QuantizeRequest, subject: Subject, proposal: Proposal) -> Splits:
    """Calibration and selection samples: two parts of the calibration split, or of calibration and train."""
    wanted = getattr(request.scheme, "calibration_samples", 256)
    needs_calibration = any(technique_of(option.params).needs_data for option in proposal.options)
    drawn = subject.samples("calibration", (wanted if needs_calibration else 0) + SELECTION_SAMPLES)
    notes = []
    if not drawn.count:
        if needs_calibration and request.scheme.scheme == "static":
            raise DataError(
                "the calibration data is empty",
                "the data gave no batch for split 'calibration'",
                "give at least a few dozen samples, not those of the eval split",
            )
        drawn = subject.samples("train", SELECTION_SAMPLES)
    if not drawn.count:
        raise DataError(
            "there is no data to choose a candidate on",
            "splits 'calibration' and 'train' are both empty, and choices are never made on evaluation data",
            "let load('calibration') give a few hundred samples",
        )
    first = min(wanted, drawn.count // 2 if drawn.count < wanted + 64 else wanted) if needs_calibration else 0
    calibration, selection = drawn.split(first)
    if needs_calibration and calibration.count < min(wanted, 32):
        notes.append(f"only {calibration.count} calibration samples: ranges read from so few may not hold")
    notes += overlap_notes(drawn, "that calibrate and choose", subject)
    return Splits(calibration, selection.split(SELECTION_SAMPLES)[0], notes)


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
        context.progress(f"making {option.name}", 0.1 + 0.25 * index / len(proposal.options))
        key = None if option.on_module else option.params.model_dump_json()
        made = make(
            option, subject, program, splits.calibration, context, request.seed, twins.get(key) if key else None
        )
        if key and made.folder:
            twins.setdefault(key, made)
        attempts.append(Attempt(made, error=made.error))
    if all(attempt.error for attempt in attempts):
        errors = [attempt.error for attempt in attempts if attempt.error]
        if len({error.what for error in errors}) == 1:
            raise errors[0]
        reasons = "; ".join(f"{a.made.option.name}: {a.error.what}" for a in attempts if a.error)
        raise TechniqueError("no candidate could be made", reasons, errors[0].fix)
    return attempts


def _final_race(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    finalists: list[Attempt],
) -> Final:
    """Baseline and finalists in full: the fastest wins, and its quality comes from the evaluation data."""
    targets = [context.work / "final" / str(index) for index in range(len(finalists) + 1)]

    def outputs(index: int, process: Process) -> None:
        whose = ["the original", *(attempt.made.option.name for attempt in finalists)][index]
        process.run_samples(subject.eval_folder, targets[index], told(context, f"evaluating {whose}"))

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
    level = [entry for entry in finished if entry[0].speedup * AS_FAST >= fastest]
    winner, timing, target = min(level, key=lambda entry: entry[0].made.size_bytes or 0)
    scale = winner.speedup / (screened[winner.made.option.name] or winner.speedup)
    for attempt, _, _ in finished:
        attempt.why = f"{attempt.speedup / winner.speedup:.0%} of the speed of the chosen one, measured in full"
    original = read_outputs(targets[0])
    metric = resolve_metric(
        subject.metric, subject.signature, original, subject.evaluation.targets, subject.reach, request.time_limit_s
    )
    quality = compare_quality(metric, original, read_outputs(target), subject.evaluation.targets, request.seed)
    return Final(winner, raced.timing(0), timing, quality, raced.load, scale)


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
    return EfficiencyReport(
        outcome=outcome,
        summary=f"{verdict_words(outcome, name, gained, quality, guard)} {quality_words(before, quality)}",
        warnings=[*subject.notes, *notes, *quality_warnings(quality, guard, real), *load_warnings(final.load)],
        next_steps=quantize_steps(request, outcome, context.run_id, gained.speedup_low is not None, needed, subject),
        verb="quantize",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, subject.bench, request.seed, subject.device, final.load),
        before=before,
        after=after,
        gains=gained,
        changed=made.changed if made else [],
        skipped=made.skipped if made else [],
        candidates=[
            *(_record(attempt, before.size_bytes or 0, sizes, final) for attempt in sorted(attempts, key=_rank)),
            *proposal.passed_over,
        ],
        macs_check=subject.macs.check if subject.macs else None,
        artifact=artifact_record(place),
        lineage=list(subject.lineage),
        repeat=repeat_of("quantize", request),
    )


def _rank(attempt: Attempt) -> tuple[int, float]:
    return ("chosen", "finalist", "dropped", "failed").index(attempt.status), -attempt.speedup
