"""Save the finalists of a quantize run, each with a report of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from omgoptim.errors import ArtifactError
from omgoptim.models.report_file import write_sealed
from omgoptim.operations.gain_attribution import is_slower, waiting_warnings
from omgoptim.operations.next_steps import new_calls, pick_step, quantize_steps, repeat_of
from omgoptim.operations.quantization.coverage import FloatModel, coverage_warnings, measure_coverage
from omgoptim.operations.quantization.final_race import FinalistResult, FinalRace
from omgoptim.operations.quantization.finalist_summary import (
    QuantizeRun,
    SavedFinalist,
    best_quantized,
    finalist_summary,
    implausible_speedup_sentence,
    is_replacement,
)
from omgoptim.operations.quantization.screening import CandidateResult, within
from omgoptim.operations.report_records import (
    artifact_record,
    environment,
    gains,
    measurement,
    output_records,
    shown_request,
)
from omgoptim.operations.timing import OVERLOADED, slow_warnings
from omgoptim.operations.verdict import (
    Outcome,
    load_warnings,
    outcome_of,
    passes,
    quality_warnings,
    samples_needed,
    size_phrase,
)
from omgoptim.reports import Alternative, Candidate, EfficiencyReport, Measurement, NextStep

Strength = Literal["speed", "size", "quality"]


def save_finalists(run: QuantizeRun) -> EfficiencyReport:
    """Move the artifacts of all finalists into the run's folder and return the winner's report.

    The report of every finalist is written beside its artifact, so `pick` measures nothing.
    """
    winner, context = run.final.winner, run.context
    _note_reasons(run)
    folders = {id(winner): context.artifact}
    kept_in = context.alternatives
    shutil.rmtree(kept_in, ignore_errors=True)  # from an interrupted run that was resumed
    kept_in.mkdir()
    for finalist in run.final.finalists:
        folder = finalist.result.built.folder
        if folder is None:
            raise ArtifactError("a finalist has no artifact")
        place = folders.setdefault(id(finalist), kept_in / finalist.slug)
        os.replace(folder, place)
        finalist.result.built = replace(finalist.result.built, folder=place)
    everyone = [_measure_finalists(run, finalist, folders[id(finalist)]) for finalist in run.final.finalists]
    reports = {kept.finalist.slug: _report(run, kept, everyone) for kept in everyone}
    for name, report in reports.items():
        asked = report.model_copy(update={"next_steps": new_calls(report, run.request)})
        write_sealed(kept_in / f"{name}.json", context.run_id, asked)
    return reports[winner.slug]


def _note_reasons(run: QuantizeRun) -> None:
    """Record the reason for the status of each finalist."""
    final, guard = run.final, run.request.max_quality_drop
    winner = final.winner
    for finalist in final.finalists:
        result = finalist.result
        if final.load > OVERLOADED:
            result.why = "speed undecided: the machine was overloaded"
        else:
            result.why = f"{result.speedup / winner.result.speedup:.0%} of the speed of the chosen candidate"
        if result.reference:
            result.why += "; float32 reference for the gain of the engine alone"
        elif not passes(finalist.quality, guard):
            result.why += f"; loses {finalist.quality.drop:.4f} on the evaluation data, above the guard {guard:g}"
    how = {"balanced": "most speedup times size ratio", "speed": "the fastest", "size": "the smallest"}
    best = how["size" if final.load > OVERLOADED else run.request.prefer]
    winner.result.status = "chosen"
    winner.result.why = f"{best} of those within the guard, or as fast and smaller"
    if winner.result.reference:
        winner.result.why = "float32 on the same engine: nothing that was asked for passes the guard"
    elif not within(winner.result, guard):
        winner.result.why = "no candidate passed the quality guard on the selection samples; this one is closest"


def _measure_finalists(run: QuantizeRun, finalist: FinalistResult, folder: Path) -> SavedFinalist:
    loaded, quality = run.loaded, finalist.quality
    count = loaded.evaluation.count
    after = measurement(folder, finalist.timing, loaded.bench, quality.after, quality.metric, count)
    gained = gains(_before(run, finalist), after, finalist.timing, quality, run.final.load)
    return SavedFinalist(finalist, folder, after, gained)


def _before(run: QuantizeRun, finalist: FinalistResult) -> Measurement:
    quality, loaded = finalist.quality, run.loaded
    return measurement(
        loaded.baseline, run.final.before, loaded.bench, quality.before, quality.metric, loaded.evaluation.count
    )


def _report(run: QuantizeRun, kept: SavedFinalist, everyone: list[SavedFinalist]) -> EfficiencyReport:
    """Build the report of a finalist as the run's artifact."""
    request, context, loaded, final = run.request, run.context, run.loaded, run.final
    finalist, quality, gained = kept.finalist, kept.finalist.quality, kept.gained
    guard, load = request.max_quality_drop, final.load
    spec, changes = finalist.result.built.spec, finalist.result.built.outcome
    outcome = outcome_of(gained, quality, guard)
    before = _before(run, finalist)
    skipped = changes.skipped if changes else []
    macs = loaded.macs.by_path if loaded.macs else {}
    original = FloatModel(run.builder.program.path, loaded.module, loaded.precision, macs)
    coverage = measure_coverage(original, kept.folder, spec.scheme, skipped, finalist.kernels)
    needed = samples_needed(quality, guard)
    others = [_alternative(run, other, everyone) for other in everyone if other is not kept]
    artifact = artifact_record(kept.folder)
    place = str(context.artifact)
    load_line = artifact.load.replace(str(kept.folder), place)
    candidates = candidate_records(run.results, final, finalist.result, before.size_bytes or 0)
    has_interval = gained.speedup_low is not None or load > OVERLOADED
    open_still = "guard_failed" if is_replacement(run, kept) else outcome
    steps = quantize_steps(request, open_still, context.run_id, has_interval, needed, loaded)
    return EfficiencyReport(
        outcome=outcome,
        summary=finalist_summary(run, kept, everyone, outcome, before),
        warnings=_warnings(run, kept, coverage_warnings(coverage, spec.runtime)),
        next_steps=[*_pick_steps(run, kept, everyone, outcome), *steps][:3],
        verb="quantize",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, load),
        before=before,
        after=kept.after,
        gains=gained,
        gains_by=finalist.parts,
        outputs=output_records(loaded.outputs, quality, finalist.timing),
        changed=changes.changed if changes else [],
        skipped=skipped,
        training=run.trained.training if run.trained else None,
        candidates=[*candidates, *run.plan.skipped],
        alternatives=others,
        delivered=finalist.slug,
        coverage=coverage,
        macs_check=loaded.macs.check if loaded.macs else None,
        artifact=artifact.model_copy(update={"path": place, "load": load_line}),
        lineage=list(loaded.lineage),
        repeat=repeat_of("quantize", request),
    )


def _warnings(run: QuantizeRun, kept: SavedFinalist, on_coverage: list[str]) -> list[str]:
    """Return the warnings of a finalist's report."""
    loaded, finalist = run.loaded, kept.finalist
    implausible = implausible_speedup_sentence(run, kept)
    waits = waiting_warnings(run.final.before, finalist.timing, run.final.load, loaded.device)
    labelled = any(target is not None for target in loaded.evaluation.targets)
    return [
        *([implausible] if implausible else waits),
        *loaded.notes,
        *run.notes,
        *on_coverage,
        *quality_warnings(finalist.quality, run.request.max_quality_drop, loaded.data.real, labelled),
        *load_warnings(run.final.load),
        *slow_warnings(run.final.before, finalist.timing),
    ]


def _pick_steps(
    run: QuantizeRun, kept: SavedFinalist, everyone: list[SavedFinalist], outcome: Outcome
) -> list[NextStep]:
    """Return calls that pick another finalist where it is better by the report's main finding."""
    context, finalist = run.context, kept.finalist
    runtime = finalist.result.built.spec.runtime
    others = [other for other in everyone if other is not kept]
    steps = []
    if outcome == "guard_failed":
        holding = [o for o in others if passes(o.finalist.quality, run.request.max_quality_drop)]
        best = max(holding, key=lambda o: run.final.preference.merit(o.finalist.result), default=None)
        if best is not None:
            name = best.finalist.result.built.spec.name
            steps.append(
                pick_step(context.run_id, best.finalist.slug, f"{name} passes the quality guard and was saved")
            )
    elif is_slower(finalist.parts, kept.after.precision):
        for other in others:
            spec = other.finalist.result.built.spec
            if spec.scheme == "fp32" and spec.runtime == runtime:
                steps.append(pick_step(context.run_id, other.finalist.slug, "float32 on the same engine is faster"))
    elif kept.after.precision == "float32":
        best = best_quantized(run, others)
        if best is not None:
            why = f"the best quantized candidate: {size_phrase(best.gained)}"
            if not passes(best.finalist.quality, run.request.max_quality_drop):
                why = f"what was asked for, which fails the guard: {size_phrase(best.gained)}"
            steps.append(pick_step(context.run_id, best.finalist.slug, why))
    return steps


def _alternative(run: QuantizeRun, kept: SavedFinalist, everyone: list[SavedFinalist]) -> Alternative:
    finalist, gained = kept.finalist, kept.gained
    guard, name = run.request.max_quality_drop, finalist.slug
    return Alternative(
        name=name,
        candidate=finalist.result.built.spec.name,
        runtime=finalist.result.built.spec.runtime,
        precision=kept.after.precision,
        best_for=_strengths(kept, everyone, guard),
        size_bytes=kept.after.size_bytes,
        size_ratio=gained.size_ratio,
        speedup=gained.speedup,
        speedup_low=gained.speedup_low,
        speedup_high=gained.speedup_high,
        quality=finalist.quality.after,
        quality_drop=finalist.quality.drop,
        holds=passes(finalist.quality, guard),
        path=str(run.context.alternatives / name),
        command=pick_step(run.context.run_id, name, "").command,
    )


def _strengths(kept: SavedFinalist, everyone: list[SavedFinalist], guard: float) -> list[Strength]:
    """Return the properties in which a finalist is best of those that pass the guard."""
    holding = [other for other in everyone if passes(other.finalist.quality, guard)]
    if kept not in holding:
        return []
    strengths: list[Strength] = []
    if kept.gained.speedup is not None and kept is max(holding, key=lambda o: o.gained.speedup or 0.0):
        strengths.append("speed")
    if kept is max(holding, key=lambda o: o.gained.size_ratio or 0.0):
        strengths.append("size")
    if kept is min(holding, key=lambda o: o.finalist.quality.drop):
        strengths.append("quality")
    return strengths


def candidate_records(
    results: Sequence[CandidateResult], final: FinalRace, chosen: CandidateResult, baseline_bytes: int
) -> list[Candidate]:
    """Return the records of all candidates, the chosen one first.

    Float32 that the request did not name is listed only where it was measured.

    Args:
        results: all candidates of the run.
        final: the finalists' measurements.
        chosen: the candidate whose report this is; another one than the run's winner is one to pick.
        baseline_bytes: size of the original's artifact.
    """
    found = []
    measured = [finalist.result for finalist in final.finalists]
    for result in sorted(results, key=_rank):
        if result.reference and result not in measured:
            continue
        record = _record(result, baseline_bytes, final)
        if result is chosen:
            record = record.model_copy(update={"status": "chosen"})
        elif result is final.winner.result:
            record = record.model_copy(update={"status": "finalist"})
        found.append(record)
    return sorted(found, key=lambda record: record.status != "chosen")


def _record(result: CandidateResult, baseline_bytes: int, final: FinalRace) -> Candidate:
    """Return the report's record of a candidate; without speedup if the machine was overloaded.

    Speedups of screening are rescaled to the final measurement: the time of the original cancels out.
    """
    trusted = final.load <= OVERLOADED
    scale = 1.0 if result.status in ("chosen", "finalist") else final.scale
    spec, size = result.built.spec, result.built.size_bytes
    return Candidate(
        name=spec.name,
        scheme=spec.scheme,
        runtime=spec.runtime,
        size_bytes=size,
        size_ratio=baseline_bytes / size if size else None,
        speedup=(result.speedup * scale or None) if trusted else None,
        quality=result.quality,
        quality_drop=result.drop,
        status=result.status,
        why=result.why,
    )


def _rank(result: CandidateResult) -> tuple[int, float]:
    return ("chosen", "finalist", "dropped", "failed").index(result.status), -result.speedup
