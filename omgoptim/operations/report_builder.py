"""The end of a run that trained: the model saved, reopened, measured against the original, and reported."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from omgoptim.measure.chance_level import chance_level_summary
from omgoptim.models.source import Recipe
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.compression_job import AnyJob
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import repeat_of
from omgoptim.operations.output_folder import deliver
from omgoptim.operations.recovery_next_steps import Result, next_steps
from omgoptim.operations.report_records import artifact_record, environment, output_records, shown_request
from omgoptim.operations.save_and_measure import Measured, measure, save
from omgoptim.operations.verdict import (
    Outcome,
    load_warnings,
    outcome_of,
    quality_warnings,
    quality_words,
    verdict_words,
)
from omgoptim.reports import Candidate, Control, EfficiencyReport, Measurement, Round, SensitivityPoint, Training
from omgoptim.techniques.registry import Outcome as Changes


@dataclass(frozen=True, slots=True)
class FinalModel:
    """The model that becomes the artifact, and what is told of how it came about."""

    name: str
    """For the verdict: `structured pruning, 50 % of the channels`."""
    module: nn.Module
    loaded: LoadedModel
    """What the module is called with, and what it descends from."""
    changes: Changes
    recipe: Recipe | None = None
    """How a fresh process builds the module, but for its surgery; None: as the subject's own."""
    missed: Callable[[Measured], str | None] = lambda _: None
    """By what was measured: why the goal was not reached, in words; None if it was."""
    facts: Sequence[str] = ()
    """Sentences for the summary, before the numbers."""
    closing: Sequence[str] = ()
    """Sentences for its end."""
    warnings: Sequence[str] = ()
    control: Callable[[Measured], Control] | None = None
    """Measures the control against the artifact."""
    rounds: list[Round] = field(default_factory=list)
    training: Training | None = None
    sensitivity: list[SensitivityPoint] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)


def build_report(verb: str, job: AnyJob, final_model: FinalModel, output: Path | None) -> EfficiencyReport:
    """Save, measure and report the model that a run ends with.

    Raises:
        OmgoptimError: it cannot be saved, reopened or measured; there is no artifact then.
    """
    request, context, loaded = job.request, job.context, job.loaded
    context.progress("saving the artifact", 0.77)
    baseline = baseline_on(request.runtime, loaded, context)
    made = context.work / "artifact"
    unknown = save(final_model.module, final_model.loaded, job.runtime, made, context, recipe=final_model.recipe)
    measured = measure(request, context, loaded, baseline, made)
    control = final_model.control(measured) if final_model.control else None
    os.replace(made, context.artifact)
    guard, missed = request.max_quality_drop, final_model.missed(measured)
    outcome: Outcome = "guard_failed" if missed else outcome_of(measured.gains, measured.quality, guard)
    place, undelivered = deliver(context.artifact, output, outcome != "guard_failed")
    warnings = [*loaded.notes, *job.datasets.notes, *final_model.warnings, *unknown, *undelivered]
    labelled = any(target is not None for target in loaded.evaluation.targets)
    warnings += quality_warnings(measured.quality, guard, loaded.data.real, labelled)
    warnings += load_warnings(measured.load)
    result = Result(
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


def _summary(
    outcome: Outcome,
    final_model: FinalModel,
    missed: str | None,
    measured: Measured,
    guard: float,
    control: Control | None,
) -> str:
    """That the original is at chance, if so; then guard and goal, what was gained, what is left, and the quality."""
    fits = outcome_of(measured.gains, measured.quality, guard) != "guard_failed"
    if outcome == "guard_failed" and missed and fits:
        first = f"The goal was not reached: {missed}. " + verdict_words(
            "ok", final_model.name, measured.gains, measured.quality, guard
        )
    else:
        first = verdict_words(outcome, final_model.name, measured.gains, measured.quality, guard)
        first += f" {missed[0].upper()}{missed[1:]}." if missed else ""
    parts = [
        chance_level_summary(measured.before.metric, measured.before.quality, final_model.loaded.evaluation.targets),
        first,
        *final_model.changes.notes,
        *final_model.facts,
        left_words(measured.before, measured.after),
        quality_words(measured.before, measured.quality),
        control_words(control),
        *final_model.closing,
    ]
    return " ".join(part for part in parts if part)


def left_words(before: Measurement, after: Measurement) -> str:
    """What is left of parameters, of those that are not zero, and of multiply-accumulates."""
    told = []
    if before.params and after.params and after.params < before.params:
        told.append(f"{after.params / before.params:.1%} of the parameters")
    if before.nonzero_params and after.nonzero_params and after.params and after.nonzero_params < 0.995 * after.params:
        told.append(f"{after.nonzero_params / before.nonzero_params:.1%} of the parameters that are not zero")
    if before.macs and after.macs and after.macs < before.macs:
        told.append(f"{after.macs / before.macs:.1%} of the multiply-accumulates")
    return f"Left: {', '.join(told)}." if told else ""


def control_words(control: Control | None) -> str:
    """Effect of distillation against the control without a teacher, with its interval."""
    if control is None or control.quality is None or control.gain is None:
        return ""
    interval = ""
    if control.gain_low is not None and control.gain_high is not None:
        interval = f", 95 % interval {control.gain_low:+.4f} to {control.gain_high:+.4f}"
    if control.kept:
        return (
            "The artifact is the control: on the selection samples the same student was better without the teacher. "
            f"Effect of distillation on the evaluation data: {control.gain:+.4f}{interval}."
        )
    clear = control.gain_low is not None and control.gain_low > 0
    effect = "significant improvement by distillation" if clear else "no significant effect of distillation"
    return (
        f"Without the teacher the same student reaches {control.quality:.4f}: {effect} ({control.gain:+.4f}{interval})."
    )
