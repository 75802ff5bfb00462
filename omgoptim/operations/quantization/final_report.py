"""Reports of the finalists of a quantize run with their summaries, each saved beside its artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omgoptim.models.samples import batch_length
from omgoptim.operations.final_measurement import FinalChoice
from omgoptim.operations.final_report import final_report, save_finalists
from omgoptim.operations.gain_attribution import gain_split_sentence, is_slower, slower_sentence
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import pick_step, quantize_steps
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidatePlan
from omgoptim.operations.quantization.coverage import (
    FloatModel,
    activation_range_warnings,
    coverage_warnings,
    float_layer_warnings,
    measure_coverage,
)
from omgoptim.operations.quantization.final_choice import (
    CandidateChoice,
    Finalist,
    gains_of_finalist,
    replacement_sentence,
)
from omgoptim.operations.quantization.qat import TrainedModel
from omgoptim.operations.quantization.screening import CandidateResult, passes_guard
from omgoptim.operations.quantization.selection import is_float
from omgoptim.operations.timing import OVERLOADED
from omgoptim.operations.verdict import (
    passes,
    quality_sentence,
    samples_needed,
    size_phrase,
    verdict_sentence,
)
from omgoptim.reports import Candidate, EfficiencyReport, GainsBy, NextStep
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Auto


@dataclass(frozen=True, slots=True)
class QuantizeRun:
    """State of a quantize run after the final measurement."""

    request: QuantizeRequest
    builder: CandidateBuilder
    plan: CandidatePlan
    results: list[CandidateResult]
    final: CandidateChoice
    notes: list[str]
    trained: TrainedModel | None = None

    @property
    def chosen(self) -> FinalChoice[CandidateResult]:
        """The measured finalists and the chosen one."""
        return self.final.measured

    @property
    def loaded(self) -> LoadedModel:
        """The original."""
        return self.builder.loaded


def save_candidates(run: QuantizeRun) -> EfficiencyReport:
    """Move the artifacts of all finalists into the run's folder and return the winner's report.

    The report of every finalist is written beside its artifact, so `pick` measures nothing.
    """
    chosen = run.chosen
    _note_reasons(run)
    report = save_finalists(chosen, {finalist.slug: _report(run, finalist) for finalist in chosen.finalists})
    for finalist in chosen.finalists:
        place = chosen.artifact_folder(finalist)
        finalist.entry.built = replace(finalist.entry.built, folder=place)
    return report


def _note_reasons(run: QuantizeRun) -> None:
    """Record the reason for the status of each finalist."""
    chosen, guard, load = run.chosen, run.chosen.guard, run.chosen.timings.load
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
    elif not passes_guard(winner, guard):
        winner.why = "no candidate passed the quality guard on the selection samples; this one is closest"


def _report(run: QuantizeRun, finalist: Finalist) -> EfficiencyReport:
    """Build the report of a finalist as the run's artifact."""
    request, loaded, chosen = run.request, run.loaded, run.chosen
    result, load = finalist.entry, chosen.timings.load
    spec, changes = result.built.spec, result.built.outcome
    parts = gains_of_finalist(chosen, finalist)
    skipped = changes.skipped if changes else []
    original = FloatModel(
        run.builder.program.path, loaded.module, loaded.precision, loaded.macs.by_path if loaded.macs else {}
    )
    coverage = measure_coverage(original, result.artifact, spec.scheme, skipped, result.kernels)
    batch = max(map(batch_length, loaded.evaluation.batches), default=1)
    notes = [
        *run.notes,
        *coverage_warnings(coverage, spec.runtime),
        *activation_range_warnings(spec.scheme, batch),
        *float_layer_warnings(result.artifact),
    ]
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
    trusted = run.chosen.timings.load <= OVERLOADED
    measured = [finalist.entry for finalist in run.chosen.finalists]
    found = []
    for result in sorted(run.results, key=_rank):
        if result.reference and result not in measured:
            continue
        status = "finalist" if result is run.chosen.winner.entry else result.status
        scale = 1.0 if result.status in ("chosen", "finalist") else run.final.scale
        size = result.built.size_bytes
        record = result.built.spec.record(
            "chosen" if result is own else status,
            result.why,
            size_bytes=size,
            size_ratio=baseline_bytes / size if size else None,
            speedup=(result.speedup * scale or None) if trusted else None,
            quality=result.quality,
            quality_drop=result.drop,
        )
        found.append(record)
    return sorted(found, key=lambda record: record.status != "chosen")


def _rank(result: CandidateResult) -> tuple[int, float]:
    return ("chosen", "finalist", "dropped", "failed").index(result.status), -result.speedup


def finalist_summary(run: QuantizeRun, finalist: Finalist, parts: GainsBy | None) -> str:
    """Return the summary: qualifications, the verdict, gains by cause, and the quality."""
    chosen, quality, precision = run.chosen, finalist.quality, finalist.after.precision
    spec, changes = finalist.entry.built.spec, finalist.entry.built.outcome
    outcome = chosen.outcome(finalist)
    implausible = chosen.implausible(finalist, parts)
    slower = slower_sentence(parts, spec.runtime, precision)
    verdict = verdict_sentence(outcome, spec.name, finalist.gains, quality, chosen.guard)
    split = gain_split_sentence(parts, spec.runtime, precision) if parts else ""
    qualified = [f"{implausible}." if implausible else "", slower, _float_only_sentence(run, finalist)]
    first = [verdict, *qualified] if outcome == "guard_failed" else [*qualified, verdict]
    words = [chosen.chance_level(finalist), *first, split, _rejected_sentence(run, finalist)]
    words += [quality_sentence(finalist.before, quality)]
    words += [run.trained.fact] if run.trained else []
    words += changes.notes if changes else []
    return " ".join(part for part in words if part)


def is_replacement(run: QuantizeRun, finalist: Finalist) -> bool:
    """Return whether this is float32, chosen although not requested, because no requested scheme passes the guard."""
    return finalist is run.chosen.winner and finalist.entry.reference


def _float_only_sentence(run: QuantizeRun, finalist: Finalist) -> str:
    """Return a sentence where the chosen candidate is float32, with the best quantized one."""
    if is_replacement(run, finalist):
        return replacement_sentence(finalist, run.final.rejected[0], run.chosen.guard)
    if finalist.after.precision != "float32" or not isinstance(run.request.scheme, Auto):
        return ""
    best = best_quantized(run, run.chosen.finalists)
    words = f"The artifact is not quantized: {finalist.entry.name} is the float32 model on another engine"
    if best is None:
        return f"{words}, and no quantized candidate was measured in full."
    speed = "speed undecided" if best.gains.speedup is None else f"{best.gains.speedup:.2f}x the original's speed"
    return (
        f"{words}. The best quantized candidate, {best.entry.name}, is {size_phrase(best.gains)}, "
        f"{speed}; its quality drop is {best.quality.drop:.4f}."
    )


def best_quantized(run: QuantizeRun, finalists: Sequence[Finalist]) -> Finalist | None:
    """Return the preferred quantized finalist, of those that pass the guard if any does; None without one."""
    quantized = [finalist for finalist in finalists if not is_float(finalist.entry)]
    holding = [finalist for finalist in quantized if passes(finalist.quality, run.chosen.guard)]
    return max(holding or quantized, key=lambda finalist: run.final.preference.merit(finalist.entry), default=None)


def _rejected_sentence(run: QuantizeRun, finalist: Finalist) -> str:
    """Return a sentence on preferred candidates that failed the guard on the evaluation data."""
    chosen, rejected = run.chosen, run.final.rejected
    if finalist is not chosen.winner or not chosen.holds or not rejected or is_replacement(run, finalist):
        return ""  # the summary begins with a replacement
    names = [f"{other.entry.name} loses {other.quality.drop:.4f}" for other in rejected]
    return (
        f"On the evaluation data {', '.join(names)}, more than {chosen.guard:g}: the artifact is the next candidate of "
        "an order fixed before that data was read."
    )
