"""Build the report of prune, factorize and distill: save, reopen and measure the final model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from omgoptim.errors import OmgoptimError
from omgoptim.measure.validity_checks import chance_level_summary
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.compression_job import AnyJob
from omgoptim.operations.gain_attribution import implausible_sentence, waiting_warnings
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import repeat_of
from omgoptim.operations.output_folder import deliver
from omgoptim.operations.recovery_next_steps import RunResult, next_steps
from omgoptim.operations.report_records import artifact_record, environment, output_records, shown_request
from omgoptim.operations.save_and_measure import MeasuredArtifact, measure, save
from omgoptim.operations.timing import slow_warnings
from omgoptim.operations.verdict import (
    Outcome,
    load_warnings,
    outcome_of,
    passes,
    quality_sentence,
    quality_warnings,
    verdict_sentence,
)
from omgoptim.reports import Candidate, Control, EfficiencyReport, Measurement, Round, SensitivityPoint, Training
from omgoptim.techniques.registry import Outcome as Changes


@dataclass(frozen=True, slots=True)
class FinalModel:
    """The model to save as the artifact, and the contents of its report."""

    name: str
    """Name in the verdict, such as `structured pruning, 50 % of the channels`."""
    module: nn.Module
    loaded: LoadedModel
    """Signature, data and lineage of the module."""
    changes: Changes
    missed: Callable[[MeasuredArtifact], str | None] = lambda _: None
    """Reason by the measurement why the goal was missed; None if it was reached."""
    facts: Sequence[str] = ()
    """Sentences for the summary, before the numbers."""
    closing: Sequence[str] = ()
    """Sentences at the end of the summary."""
    warnings: Sequence[str] = ()
    control: Callable[[MeasuredArtifact], Control] | None = None
    """Measurement of the control against the artifact."""
    rounds: list[Round] = field(default_factory=list)
    training: Training | None = None
    sensitivity: list[SensitivityPoint] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    fallback: Callable[[MeasuredArtifact], FinalModel | None] = lambda _: None
    """Next model of an order fixed before the evaluation data is read, for where this measurement fails the guard."""


def build_report(verb: str, job: AnyJob, final_model: FinalModel, output: Path | None) -> EfficiencyReport:
    """Save, measure and report the final model of a run.

    Raises:
        OmgoptimError: it cannot be saved, reopened or measured.
    """
    request, context, loaded = job.request, job.context, job.loaded
    context.progress("saving the artifact", 0.77)
    baseline = baseline_on(request.runtime, loaded, context)
    final_model, measured, folder, unknown = _first_within_guard(job, final_model, baseline)
    control = final_model.control(measured) if final_model.control else None
    os.replace(folder, context.artifact)
    guard, missed = request.max_quality_drop, final_model.missed(measured)
    outcome: Outcome = "guard_failed" if missed else outcome_of(measured.gains, measured.quality, guard)
    fault = "the goal was missed" if passes(measured.quality, guard) else "the artifact fails the quality guard"
    place, undelivered = deliver(context.artifact, output, outcome != "guard_failed", fault)
    warnings = waiting_warnings(measured.original, measured.timing, measured.load, loaded.device)
    warnings += [*loaded.notes, *job.datasets.notes, *final_model.warnings, *unknown, *undelivered]
    labelled = any(target is not None for target in loaded.evaluation.targets)
    warnings += quality_warnings(measured.quality, guard, loaded.data.real, labelled)
    warnings += [*load_warnings(measured.load), *slow_warnings(measured.original, measured.timing)]
    result = RunResult(
        outcome, context.run_id, measured.gains, missed is not None, final_model.rounds, final_model.training
    )
    return EfficiencyReport(
        outcome=outcome,
        summary=_summary(outcome, final_model, missed, measured, guard, control),
        warnings=warnings,
        next_steps=next_steps(verb, request, loaded, result),
        verb=verb,
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, measured.load),
        before=measured.before,
        after=measured.after,
        gains=measured.gains,
        outputs=output_records(loaded.outputs, measured.quality, measured.timing),
        changed=final_model.changes.changed,
        skipped=final_model.changes.skipped,
        rounds=final_model.rounds,
        training=final_model.training,
        control=control,
        sensitivity=final_model.sensitivity,
        candidates=final_model.candidates,
        macs_check=loaded.macs.check if loaded.macs else None,
        artifact=artifact_record(place),
        lineage=list(final_model.loaded.lineage),
        repeat=repeat_of(verb, request),
    )


def _first_within_guard(
    job: AnyJob, final_model: FinalModel, baseline: Path
) -> tuple[FinalModel, MeasuredArtifact, Path, list[str]]:
    """Save and measure models in their fixed order until one passes the guard on the evaluation data.

    Returns:
        The model, its measurement, its artifact and notes on its programs; where none passes, those of the first.
    """
    request, context = job.request, job.context
    tried: list[tuple[FinalModel, MeasuredArtifact, Path, list[str]]] = []
    model: FinalModel | None = final_model
    while model is not None:
        folder = context.work / f"artifact-{len(tried)}"
        try:
            notes = save(model.module, model.loaded, job.runtime, folder, context)
            measured = measure(request, context, job.loaded, baseline, folder)
        except OmgoptimError:
            if tried:  # what was measured before remains valid
                break
            raise
        tried.append((model, measured, folder, notes))
        if passes(measured.quality, request.max_quality_drop):
            return tried[-1]
        model = model.fallback(measured)
    first, measured, folder, notes = tried[0]
    others = ", ".join(model.name for model, *_ in tried[1:])
    failed = [f"tried instead, and failed the guard on the evaluation data too: {others}"] if others else []
    return first, measured, folder, [*notes, *failed]


def _summary(
    outcome: Outcome,
    final_model: FinalModel,
    missed: str | None,
    measured: MeasuredArtifact,
    guard: float,
    control: Control | None,
) -> str:
    """Return the summary: chance level, an implausible speedup, verdict, facts, remaining size, quality and control."""
    fits = outcome_of(measured.gains, measured.quality, guard) != "guard_failed"
    if outcome == "guard_failed" and missed and fits:
        first = f"The goal was missed: {missed}. " + verdict_sentence(
            "ok", final_model.name, measured.gains, measured.quality, guard
        )
    else:
        first = verdict_sentence(outcome, final_model.name, measured.gains, measured.quality, guard)
        first += f" {missed[0].upper()}{missed[1:]}." if missed else ""
    device = final_model.loaded.device
    implausible = implausible_sentence(None, measured.original, "", device, measured.load, measured.timing)
    parts = [
        chance_level_summary(measured.before.metric, measured.before.quality, final_model.loaded.evaluation.targets),
        f"{implausible}." if implausible else "",
        first,
        *final_model.changes.notes,
        *final_model.facts,
        remaining_sentence(measured.before, measured.after),
        quality_sentence(measured.before, measured.quality),
        control_sentence(control),
        *final_model.closing,
    ]
    return " ".join(part for part in parts if part)


def remaining_sentence(before: Measurement, after: Measurement) -> str:
    """Return a sentence on the remaining parameters, nonzero parameters and multiply-accumulates."""
    parts = []
    if before.params and after.params and after.params < before.params:
        parts.append(f"{after.params / before.params:.1%} of the parameters")
    if before.nonzero_params and after.nonzero_params and after.params and after.nonzero_params < 0.995 * after.params:
        parts.append(f"{after.nonzero_params / before.nonzero_params:.1%} of the nonzero parameters")
    if before.macs and after.macs and after.macs < before.macs:
        parts.append(f"{after.macs / before.macs:.1%} of the multiply-accumulates")
    return f"Remaining: {', '.join(parts)}." if parts else ""


def control_sentence(control: Control | None) -> str:
    """Return a sentence on the effect of distillation against the control, with its interval."""
    if control is None or control.quality is None or control.gain is None:
        return ""
    interval = ""
    if control.gain_low is not None and control.gain_high is not None:
        interval = f", 95 % interval {control.gain_low:+.4f} to {control.gain_high:+.4f}"
    if control.kept:
        return (
            "The artifact is the control: without the teacher the same student is better on the selection samples. "
            f"Effect of distillation on the evaluation data: {control.gain:+.4f}{interval}."
        )
    clear = control.gain_low is not None and control.gain_low > 0
    effect = "significant improvement by distillation" if clear else "no significant effect of distillation"
    return (
        f"Without the teacher the same student reaches {control.quality:.4f}: {effect} ({control.gain:+.4f}{interval})."
    )
