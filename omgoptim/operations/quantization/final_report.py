"""Reports of the finalists of a quantize run, each saved beside its artifact."""

from __future__ import annotations

from dataclasses import replace

from omgoptim.operations.final_report import final_report, save_finalists
from omgoptim.operations.gain_attribution import is_slower
from omgoptim.operations.next_steps import pick_step, quantize_steps
from omgoptim.operations.quantization.coverage import FloatModel, coverage_warnings, measure_coverage
from omgoptim.operations.quantization.final_race import Finalist, gain_split
from omgoptim.operations.quantization.finalist_summary import (
    QuantizeRun,
    best_quantized,
    finalist_summary,
    is_replacement,
)
from omgoptim.operations.quantization.screening import CandidateResult, within
from omgoptim.operations.timing import OVERLOADED
from omgoptim.operations.verdict import passes, samples_needed, size_phrase
from omgoptim.reports import Candidate, EfficiencyReport, GainsBy, NextStep


def save_candidates(run: QuantizeRun) -> EfficiencyReport:
    """Move the artifacts of all finalists into the run's folder and return the winner's report.

    The report of every finalist is written beside its artifact, so `pick` measures nothing.
    """
    chosen = run.chosen
    _note_reasons(run)
    report = save_finalists(chosen, {finalist.slug: _report(run, finalist) for finalist in chosen.finalists})
    for finalist in chosen.finalists:
        place = chosen.place(finalist)
        finalist.entry.built = replace(finalist.entry.built, folder=place)
    return report


def _note_reasons(run: QuantizeRun) -> None:
    """Record the reason for the status of each finalist."""
    chosen, guard, load = run.chosen, run.chosen.guard, run.chosen.race.load
    winner = chosen.winner.entry
    for finalist in chosen.finalists:
        result = finalist.entry
        if load > OVERLOADED:
            result.why = "speed undecided: the machine was overloaded"
        else:
            result.why = f"{result.speedup / winner.speedup:.0%} of the speed of the chosen candidate"
        if result.reference:
            result.why += "; float32 reference for the gain of the engine alone"
        elif not passes(finalist.quality, guard):
            result.why += f"; loses {finalist.quality.drop:.4f} on the evaluation data, above the guard {guard:g}"
    how = {"balanced": "most speedup times size ratio", "speed": "the fastest", "size": "the smallest"}
    best = how["size" if load > OVERLOADED else run.request.prefer]
    winner.status = "chosen"
    winner.why = f"{best} of those within the guard, or as fast and smaller"
    if winner.reference:
        winner.why = "float32 on the same engine: no requested scheme passes the guard"
    elif not within(winner, guard):
        winner.why = "no candidate passed the quality guard on the selection samples; this one is closest"


def _report(run: QuantizeRun, finalist: Finalist) -> EfficiencyReport:
    """Build the report of a finalist as the run's artifact."""
    request, loaded, chosen = run.request, run.loaded, run.chosen
    result, load = finalist.entry, chosen.race.load
    spec, changes = result.built.spec, result.built.outcome
    parts = gain_split(chosen, finalist)
    skipped = changes.skipped if changes else []
    original = FloatModel(
        run.builder.program.path, loaded.module, loaded.precision, loaded.macs.by_path if loaded.macs else {}
    )
    coverage = measure_coverage(original, result.artifact, spec.scheme, skipped, result.kernels)
    notes = [*run.notes, *coverage_warnings(coverage, spec.runtime)]
    report = final_report(chosen, finalist, finalist_summary(run, finalist, parts), notes, parts)
    has_interval = finalist.gains.speedup_low is not None or load > OVERLOADED
    open_still = "guard_failed" if is_replacement(run, finalist) else report.outcome
    needed = samples_needed(finalist.quality, chosen.guard)
    steps = quantize_steps(request, open_still, chosen.context.run_id, has_interval, needed, loaded)
    return report.model_copy(
        update={
            "next_steps": [*_pick_steps(run, finalist, parts), *steps][:3],
            "changed": changes.changed if changes else [],
            "skipped": skipped,
            "training": run.trained.training if run.trained else None,
            "candidates": [*candidate_records(run, result, finalist.before.size_bytes or 0), *run.plan.skipped],
            "coverage": coverage,
        }
    )


def _pick_steps(run: QuantizeRun, finalist: Finalist, parts: GainsBy | None) -> list[NextStep]:
    """Return calls that pick another finalist where it is better by the report's main finding."""
    chosen, precision = run.chosen, finalist.after.precision
    others = [other for other in chosen.finalists if other is not finalist]
    steps: list[tuple[Finalist, str]] = []
    if chosen.outcome(finalist) == "guard_failed":
        holding = [other for other in others if passes(other.quality, chosen.guard)]
        best = max(holding, key=lambda other: run.final.preference.merit(other.entry), default=None)
        if best is not None:
            steps = [(best, f"{best.entry.name} passes the quality guard and was saved")]
    elif is_slower(parts, precision):
        for other in others:
            spec = other.entry.built.spec
            if spec.scheme == "fp32" and spec.runtime == finalist.entry.built.spec.runtime:
                steps.append((other, "float32 on the same engine is faster"))
    elif precision == "float32":
        best = best_quantized(run, others)
        if best is not None:
            fits = passes(best.quality, chosen.guard)
            why = "the best quantized candidate" if fits else "the requested scheme, which fails the guard"
            steps = [(best, f"{why}: {size_phrase(best.gains)}")]
    return [pick_step(chosen.context.run_id, other.slug, why) for other, why in steps]


def candidate_records(run: QuantizeRun, own: CandidateResult, baseline_bytes: int) -> list[Candidate]:
    """Return the records of all candidates, the chosen one first.

    Float32 that the request did not name is listed only where it was measured. Speedups of screening are rescaled to
    the final measurement: the time of the original cancels out. On an overloaded machine there are none.

    Args:
        run: with all candidates and the finalists' measurements.
        own: the candidate whose report this is; another one than the run's winner is one to pick.
        baseline_bytes: size of the original's artifact.
    """
    trusted = run.chosen.race.load <= OVERLOADED
    measured = [finalist.entry for finalist in run.chosen.finalists]
    found = []
    for result in sorted(run.results, key=_rank):
        if result.reference and result not in measured:
            continue
        status = "finalist" if result is run.chosen.winner.entry else result.status
        scale = 1.0 if result.status in ("chosen", "finalist") else run.final.scale
        spec, size = result.built.spec, result.built.size_bytes
        record = Candidate(
            name=spec.name,
            scheme=spec.scheme,
            runtime=spec.runtime,
            size_bytes=size,
            size_ratio=baseline_bytes / size if size else None,
            speedup=(result.speedup * scale or None) if trusted else None,
            quality=result.quality,
            quality_drop=result.drop,
            status="chosen" if result is own else status,
            why=result.why,
        )
        found.append(record)
    return sorted(found, key=lambda record: record.status != "chosen")


def _rank(result: CandidateResult) -> tuple[int, float]:
    return ("chosen", "finalist", "dropped", "failed").index(result.status), -result.speedup
