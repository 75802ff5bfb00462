"""Build the report of prune, factorize and distill: save, reopen and measure the final model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from omgoptim.errors import OmgoptimError
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.compression_job import AnyJob
from omgoptim.operations.context import Stage
from omgoptim.operations.final_measurement import (
    FinalChoice,
    MeasuredArtifact,
    NamedArtifact,
    RankingRule,
    measure_finalists,
)
from omgoptim.operations.final_report import final_report, with_output
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.recovery_next_steps import RunResult, next_steps
from omgoptim.operations.save_module import save
from omgoptim.operations.verdict import Outcome, quality_sentence, verdict_sentence
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
    control: Callable[[FinalChoice[NamedArtifact]], Control] | None = None
    """Measurement of the control against the artifact."""
    rounds: list[Round] = field(default_factory=list)
    training: Training | None = None
    sensitivity: list[SensitivityPoint] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    fallback: Callable[[MeasuredArtifact], FinalModel | None] = lambda _: None
    """Next model of an order fixed before the evaluation data is read, for where this measurement fails the guard."""


def build_report(job: AnyJob, final_model: FinalModel, output: Path | None) -> EfficiencyReport:
    """Save, measure and report the final model of a run.

    Raises:
        OmgoptimError: it cannot be saved, reopened or measured.
    """
    request, context, loaded = job.request, job.context, job.loaded
    context.progress("saving the artifact", 0.77)
    baseline = baseline_on(request.runtime, loaded, context)
    final_model, chosen, notes = _first_within_guard(job, final_model, replace(loaded, baseline=baseline))
    measured = chosen.winner
    control = final_model.control(chosen) if final_model.control else None
    missed = final_model.missed(measured)
    summary = _summary(chosen, final_model, missed, control)
    report = final_report(chosen, measured, summary, [*job.datasets.notes, *final_model.warnings, *notes])
    outcome: Outcome = "guard_failed" if missed else chosen.outcome(measured)
    result = RunResult(
        outcome, context.run_id, measured.gains, missed is not None, final_model.rounds, final_model.training
    )
    update = {
        "outcome": outcome,
        "next_steps": next_steps(request, loaded, result),
        "changed": final_model.changes.changed,
        "skipped": final_model.changes.skipped,
        "rounds": final_model.rounds,
        "training": final_model.training,
        "control": control,
        "sensitivity": final_model.sensitivity,
        "candidates": final_model.candidates,
        "lineage": list(final_model.loaded.lineage),
    }
    os.replace(measured.entry.artifact, context.artifact)
    fault = "the goal was missed" if chosen.holds else "the artifact fails the quality guard"
    return with_output(report.model_copy(update=update), context.artifact, output, fault)


def _first_within_guard(
    job: AnyJob, final_model: FinalModel, loaded: LoadedModel
) -> tuple[FinalModel, FinalChoice[NamedArtifact], list[str]]:
    """Save and measure models in their fixed order until one passes the guard on the evaluation data.

    Args:
        job: the run.
        final_model: the first of them; each names the next.
        loaded: the original, its baseline on the engine of the artifact.

    Returns:
        The model, its measurement and notes on its programs; where none passes, those of the first.
    """
    context = job.context
    tried: list[tuple[FinalModel, FinalChoice[NamedArtifact], list[str]]] = []
    model: FinalModel | None = final_model
    stage = Stage(context, "measuring the result against the original", (0.8, 0.98))
    while model is not None:
        entry = NamedArtifact("the result", context.work / f"artifact-{len(tried)}")
        try:
            notes = save(model.module, model.loaded, job.runtime, entry.artifact, context)
            chosen = measure_finalists(job.request, loaded, [entry], RankingRule(), stage)
        except OmgoptimError:
            if tried:  # what was measured before remains valid
                break
            raise
        tried.append((model, chosen, notes))
        if chosen.holds:
            return tried[-1]
        model = model.fallback(chosen.winner)
    first, chosen, notes = tried[0]
    others = ", ".join(model.name for model, *_ in tried[1:])
    failed = [f"tried instead, and failed the guard on the evaluation data too: {others}"] if others else []
    return first, chosen, [*notes, *failed]


def _summary(
    chosen: FinalChoice[NamedArtifact], final_model: FinalModel, missed: str | None, control: Control | None
) -> str:
    """Return the summary: chance level, an implausible speedup, verdict, facts, remaining size, quality and control."""
    measured, name = chosen.winner, final_model.name
    verdict = verdict_sentence(chosen.outcome(measured), name, measured.gains, measured.quality, chosen.guard)
    if missed and chosen.holds:
        verdict = verdict_sentence("ok", name, measured.gains, measured.quality, chosen.guard)
        verdict = f"The goal was missed: {missed}. {verdict}"
    elif missed:
        verdict += f" {missed[0].upper()}{missed[1:]}."
    parts = [
        *chosen.leading_warnings(measured),
        verdict,
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
