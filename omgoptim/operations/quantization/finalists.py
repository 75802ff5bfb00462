"""The end of a quantize run: the winner and the other finalists kept, each with a report of its own."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from omgoptim.errors import ArtifactError
from omgoptim.measure.chance_level import chance_level_summary
from omgoptim.models.report_file import write_sealed
from omgoptim.operations.context import RunContext
from omgoptim.operations.gain_attribution import implausible_words, slower_words, split_words
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import new_calls, pick_step, quantize_steps, repeat_of
from omgoptim.operations.quantization.candidate_records import candidate_records
from omgoptim.operations.quantization.candidates import Program, Proposal
from omgoptim.operations.quantization.coverage import coverage_warnings, prove
from omgoptim.operations.quantization.final_race import Final, Finalist, in_place_words
from omgoptim.operations.quantization.qat import Trained
from omgoptim.operations.quantization.screening import CandidateResult, within
from omgoptim.operations.quantization.selection import is_float
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
    quality_words,
    samples_needed,
    size_words,
    verdict_words,
)
from omgoptim.reports import Alternative, EfficiencyReport, Gains, Measurement, NextStep
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Auto

Strength = Literal["speed", "size", "quality"]


@dataclass(frozen=True, slots=True)
class Run:
    """A quantize run whose finalists are measured."""

    request: QuantizeRequest
    context: RunContext
    loaded: LoadedModel
    program: Program
    proposal: Proposal
    results: list[CandidateResult]
    final: Final
    notes: list[str]
    trained: Trained | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    """A finalist in its place in the run's folder, with its measurement."""

    finalist: Finalist
    folder: Path
    after: Measurement
    gained: Gains


def keep(run: Run) -> EfficiencyReport:
    """Put the winner's artifact and those of the other finalists in their places, each whole, and report the winner.

    The report of every finalist is written beside its artifact: `pick` needs no measuring.
    """
    winner, context = run.final.winner, run.context
    _tell(run)
    folders = {id(winner): context.artifact}
    kept_in = context.alternatives
    shutil.rmtree(kept_in, ignore_errors=True)  # of a run that was cut off and resumed
    kept_in.mkdir()
    for finalist in run.final.finalists:
        folder = finalist.result.made.folder
        if folder is None:
            raise ArtifactError("a finalist has no artifact")
        place = folders.setdefault(id(finalist), kept_in / finalist.slug)
        os.replace(folder, place)
        finalist.result.made = replace(finalist.result.made, folder=place)
    everyone = [_measured(run, finalist, folders[id(finalist)]) for finalist in run.final.finalists]
    reports = {kept.finalist.slug: _report(run, kept, everyone) for kept in everyone}
    for name, report in reports.items():
        asked = report.model_copy(update={"next_steps": new_calls(report, run.request)})
        write_sealed(kept_in / f"{name}.json", context.run_id, asked)
    return reports[winner.slug]


def _tell(run: Run) -> None:
    """Note why each finalist is what it is."""
    final, guard = run.final, run.request.max_quality_drop
    winner = final.winner
    for finalist in final.finalists:
        result = finalist.result
        if final.load > OVERLOADED:
            result.why = "speed undecided: the machine was overloaded"
        else:
            result.why = f"{result.speedup / winner.result.speedup:.0%} of the speed of the chosen one"
        if result.reference:
            result.why += "; float32 on the same engine: what the engine alone brings"
        elif not passes(finalist.quality, guard):
            result.why += f"; loses {finalist.quality.drop:.4f} on the evaluation data, above the guard {guard:g}"
    how = {"balanced": "most speedup times size ratio", "speed": "the fastest", "size": "the smallest"}
    best = how["size" if final.load > OVERLOADED else run.request.prefer]
    winner.result.status = "chosen"
    winner.result.why = f"{best} of those within the guard, or as fast and smaller"
    if winner.result.reference:
        winner.result.why = "float32 on the same engine: nothing that was asked for holds the guard, and this does"
    elif not within(winner.result, guard):
        winner.result.why = "no candidate held the guard on the selection samples; this one came closest"


def _measured(run: Run, finalist: Finalist, folder: Path) -> _Kept:
    loaded, quality = run.loaded, finalist.quality
    count = loaded.evaluation.count
    after = measurement(folder, finalist.timing, loaded.bench, quality.after, quality.metric, count)
    gained = gains(_before(run, finalist), after, finalist.timing, quality, run.final.load)
    return _Kept(finalist, folder, after, gained)


def _before(run: Run, finalist: Finalist) -> Measurement:
    quality, loaded = finalist.quality, run.loaded
    return measurement(
        loaded.baseline, run.final.before, loaded.bench, quality.before, quality.metric, loaded.evaluation.count
    )


def _report(run: Run, kept: _Kept, everyone: list[_Kept]) -> EfficiencyReport:
    """The report of a finalist as that of the run's artifact."""
    request, context, loaded, final = run.request, run.context, run.loaded, run.final
    finalist, quality, gained = kept.finalist, kept.finalist.quality, kept.gained
    guard, load = request.max_quality_drop, final.load
    option, made = finalist.result.made.option, finalist.result.made.outcome
    outcome = outcome_of(gained, quality, guard)
    before = _before(run, finalist)
    skipped = made.skipped if made else []
    coverage = prove(
        *(run.program.path, loaded.module, kept.folder, option.scheme, skipped, finalist.kernels),
        precision=loaded.precision,
        macs=loaded.macs.by_path if loaded.macs else None,
    )
    needed = samples_needed(quality, guard)
    others = [_alternative(run, other, everyone) for other in everyone if other is not kept]
    artifact = artifact_record(kept.folder)
    place = str(context.artifact)
    load_line = artifact.load.replace(str(kept.folder), place)
    said = _implausible(run, kept)
    warnings = [*([said] if said else []), *loaded.notes, *run.notes, *coverage_warnings(coverage, option.runtime)]
    labelled = any(target is not None for target in loaded.evaluation.targets)
    warnings += [*quality_warnings(quality, guard, loaded.data.real, labelled), *load_warnings(load)]
    warnings += slow_warnings(final.before, finalist.timing)
    candidates = candidate_records(run.results, final, finalist.result, before.size_bytes or 0)
    told = gained.speedup_low is not None or load > OVERLOADED
    open_still = "guard_failed" if _in_place(run, kept) else outcome
    steps = quantize_steps(request, open_still, context.run_id, told, needed, loaded)
    return EfficiencyReport(
        outcome=outcome,
        summary=_summary(run, kept, everyone, outcome, before),
        warnings=warnings,
        next_steps=[*_picks(run, kept, everyone, outcome), *steps][:3],
        verb="quantize",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, load),
        before=before,
        after=kept.after,
        gains=gained,
        gains_by=finalist.parts,
        outputs=output_records(loaded.outputs, quality, finalist.timing),
        changed=made.changed if made else [],
        skipped=skipped,
        training=run.trained.training if run.trained else None,
        candidates=[*candidates, *run.proposal.passed_over],
        alternatives=others,
        delivered=finalist.slug,
        coverage=coverage,
        macs_check=loaded.macs.check if loaded.macs else None,
        artifact=artifact.model_copy(update={"path": place, "load": load_line}),
        lineage=list(loaded.lineage),
        repeat=repeat_of("quantize", request),
    )


def _in_place(run: Run, kept: _Kept) -> bool:
    """Return whether this is float32 that nobody asked for, delivered because nothing that was holds the guard."""
    return kept.finalist is run.final.winner and kept.finalist.result.reference


def _implausible(run: Run, kept: _Kept) -> str:
    parts, runtime = kept.finalist.parts, kept.finalist.result.made.option.runtime
    if parts is None:
        return ""
    return implausible_words(parts, run.final.before, runtime, run.loaded.device, run.final.load, kept.finalist.timing)


def _summary(run: Run, kept: _Kept, everyone: list[_Kept], outcome: Outcome, before: Measurement) -> str:
    """What qualifies the gain first, then the verdict, what it comes from, and the quality."""
    finalist, guard = kept.finalist, run.request.max_quality_drop
    option, made = finalist.result.made.option, finalist.result.made.outcome
    parts, precision = finalist.parts, kept.after.precision
    implausible = _implausible(run, kept)
    slower = slower_words(parts, option.runtime, precision) if parts else ""
    verdict = verdict_words(outcome, option.name, kept.gained, finalist.quality, guard)
    split = split_words(parts, option.runtime, precision) if parts else ""
    qualified = [f"{implausible}." if implausible else "", slower, _nothing_quantized(run, kept, everyone)]
    first = [verdict, *qualified] if outcome == "guard_failed" else [*qualified, verdict]
    doubt = chance_level_summary(finalist.quality.metric, finalist.quality.before, run.loaded.evaluation.targets)
    words = [doubt, *first, split, _passed_over(run, kept), quality_words(before, finalist.quality)]
    words += [run.trained.fact] if run.trained else []
    words += made.notes if made else []
    return " ".join(part for part in words if part)


def _nothing_quantized(run: Run, kept: _Kept, everyone: list[_Kept]) -> str:
    """That float32 was delivered though quantization was asked for, and what the best quantized one is."""
    if _in_place(run, kept):
        return in_place_words(kept.finalist, run.final.passed_over[0], run.request.max_quality_drop)
    if kept.after.precision != "float32" or not isinstance(run.request.scheme, Auto):
        return ""
    best = _best_quantized(run, everyone)
    name = kept.finalist.result.made.option.name
    words = f"Nothing was quantized: {name} is the float32 model on another engine"
    if best is None:
        return f"{words}, and no quantized candidate was measured in full."
    gained, quality = best.gained, best.finalist.quality
    speed = "speed undecided" if gained.speedup is None else f"{gained.speedup:.2f}x the original's speed"
    return (
        f"{words}. The best quantized one, {best.finalist.result.made.option.name}, is {size_words(gained)}, {speed}, "
        f"and loses {quality.drop:.4f}."
    )


def _best_quantized(run: Run, everyone: list[_Kept]) -> _Kept | None:
    quantized = [kept for kept in everyone if not is_float(kept.finalist.result)]
    guard = run.request.max_quality_drop
    holding = [kept for kept in quantized if passes(kept.finalist.quality, guard)]
    among = holding or quantized
    return max(among, key=lambda kept: run.final.preference.merit(kept.finalist.result), default=None)


def _passed_over(run: Run, kept: _Kept) -> str:
    """Which candidates came first and failed the guard on the evaluation data."""
    if kept.finalist is not run.final.winner or not run.final.holds or not run.final.passed_over:
        return ""
    if _in_place(run, kept):
        return ""  # said first
    guard = run.request.max_quality_drop
    names = [f"{f.result.made.option.name} loses {f.quality.drop:.4f}" for f in run.final.passed_over]
    return (
        f"On the evaluation data {', '.join(names)}, more than {guard:g}: the next in an order fixed before that data "
        "was read was delivered."
    )


def _picks(run: Run, kept: _Kept, everyone: list[_Kept], outcome: Outcome) -> list[NextStep]:
    """Calls that deliver another finalist, where it is better in what the report says first."""
    context, finalist = run.context, kept.finalist
    runtime = finalist.result.made.option.runtime
    others = [other for other in everyone if other is not kept]
    parts = finalist.parts
    steps = []
    if outcome == "guard_failed":
        holding = [o for o in others if passes(o.finalist.quality, run.request.max_quality_drop)]
        best = max(holding, key=lambda o: run.final.preference.merit(o.finalist.result), default=None)
        if best is not None:
            name = best.finalist.result.made.option.name
            steps.append(pick_step(context.run_id, best.finalist.slug, f"{name} holds the guard, and is kept"))
    elif parts and slower_words(parts, runtime, kept.after.precision):
        for other in others:
            option = other.finalist.result.made.option
            if option.scheme == "fp32" and option.runtime == runtime:
                steps.append(pick_step(context.run_id, other.finalist.slug, "float32 on the same engine is faster"))
    elif kept.after.precision == "float32":
        best = _best_quantized(run, others)
        if best is not None:
            why = f"the best quantized one: {size_words(best.gained)}"
            if not passes(best.finalist.quality, run.request.max_quality_drop):
                why = f"what was asked for, which fails the guard: {size_words(best.gained)}"
            steps.append(pick_step(context.run_id, best.finalist.slug, why))
    return steps


def _alternative(run: Run, kept: _Kept, everyone: list[_Kept]) -> Alternative:
    finalist, gained = kept.finalist, kept.gained
    guard, name = run.request.max_quality_drop, finalist.slug
    return Alternative(
        name=name,
        candidate=finalist.result.made.option.name,
        runtime=finalist.result.made.option.runtime,
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


def _strengths(kept: _Kept, everyone: list[_Kept], guard: float) -> list[Strength]:
    """What a finalist is the best in, of those that hold the guard."""
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
