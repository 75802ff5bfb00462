"""The end of a run of rounds: the kept model saved, reopened, measured against the original, and reported."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omgoptim.operations.advice import repeat_of
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.delivery import Measured, measure, save
from omgoptim.operations.measured import artifact_record, environment, shown_request
from omgoptim.operations.output import deliver
from omgoptim.operations.reshaping_advice import next_steps
from omgoptim.operations.rounds import Job, Kept, merged, reestimation_gain, training_record
from omgoptim.operations.verdict import (
    Outcome,
    load_warnings,
    outcome_of,
    quality_warnings,
    quality_words,
    verdict_words,
)
from omgoptim.reports import EfficiencyReport, Measurement, SensitivityPoint

LORA_WORDS = (
    "adapters were trained and merged into the weights: they saved memory while training, and save no time at inference"
)


@dataclass(frozen=True, slots=True)
class Goal:
    """What the run was to reach, in words, and whether it did."""

    name: str
    """For the verdict: `structured pruning, 50 % of the channels`."""
    missed: Callable[[Measured], str | None] = lambda _: None
    """By what was measured: why it was not reached, in words; None if it was."""
    facts: Sequence[str] = field(default_factory=tuple)
    """Sentences for the summary that are the technique's own."""


def conclude(
    verb: str,
    job: Job,
    kept: Kept,
    goal: Goal,
    output: Path | None,
    sensitivity: Sequence[SensitivityPoint],
) -> EfficiencyReport:
    """Save, measure and report the kept round's model.

    Raises:
        OmgoptimError: it cannot be saved, reopened or measured; there is no artifact then.
    """
    request, context, subject = job.request, job.context, job.subject
    context.progress("saving the artifact", 0.77)
    baseline = baseline_on(request.runtime, subject, context)
    made = context.work / "artifact"
    untold = save(kept.stage.module, subject, job.runtime, made, context)
    measured = measure(request, context, subject, baseline, made)
    os.replace(made, context.artifact)
    missed = _rewound(job, kept) or goal.missed(measured)
    outcome = _outcome(measured, request.max_quality_drop, missed)
    place, undelivered = deliver(context.artifact, output, outcome != "guard_failed")
    quality, real = measured.quality, subject.data.real
    changes = merged(kept.stages, kept.stage)
    training = training_record(job, kept.stages)
    warnings = [*subject.notes, *job.material.notes, *kept.stage.warnings, *untold, *undelivered]
    if training is not None and request.recover == "lora":
        warnings.append(LORA_WORDS)
    warnings += [*quality_warnings(quality, request.max_quality_drop, real), *load_warnings(measured.load)]
    return EfficiencyReport(
        outcome=outcome,
        summary=_summary(outcome, goal, missed, measured, job, kept),
        warnings=warnings,
        next_steps=next_steps(verb, request, outcome, context.run_id, subject, measured.gains, missed is not None),
        verb=verb,
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, subject.bench, request.seed, subject.device, measured.load),
        before=measured.before,
        after=measured.after,
        gains=measured.gains,
        changed=changes.changed,
        skipped=changes.skipped,
        rounds=[stage.record for stage in kept.stages],
        training=training,
        sensitivity=list(sensitivity),
        macs_check=subject.macs.check if subject.macs else None,
        artifact=artifact_record(place),
        lineage=list(subject.lineage),
        repeat=repeat_of(verb, request),
    )


def _outcome(measured: Measured, guard: float, missed: str | None) -> Outcome:
    """The guard and the goal first, then whether anything was gained."""
    found = outcome_of(measured.gains, measured.quality, guard)
    return "guard_failed" if missed else found


def _rewound(job: Job, kept: Kept) -> str | None:
    """That the artifact is an earlier round than was asked for, and why."""
    if not kept.rewound:
        return None
    last, chosen = kept.stages[-1].record, kept.stage.record
    lost = "collapsed" if last.quality_drop is None else f"loses {last.quality_drop:.4f} on the selection samples"
    amount = "" if chosen.amount is None else f" (amount {chosen.amount:.3g} of {_goal_amount(kept):.3g})"
    return (
        f"round {last.number} {lost}, more than {job.request.max_quality_drop:g}: round {chosen.number} is kept{amount}"
    )


def _goal_amount(kept: Kept) -> float:
    """The amount of the last round that was made."""
    return kept.stages[-1].record.amount or 0.0


def _summary(outcome: Outcome, goal: Goal, missed: str | None, measured: Measured, job: Job, kept: Kept) -> str:
    guard = job.request.max_quality_drop
    fits = outcome_of(measured.gains, measured.quality, guard) != "guard_failed"
    if outcome == "guard_failed" and missed and fits:
        first = f"The goal was not reached: {missed}. " + verdict_words(
            "ok", goal.name, measured.gains, measured.quality, guard
        )
    else:
        first = verdict_words(outcome, goal.name, measured.gains, measured.quality, guard)
        first += f" {missed[0].upper()}{missed[1:]}." if missed else ""
    parts = [
        first,
        *kept.stage.outcome.notes,
        *goal.facts,
        left_words(measured.before, measured.after),
        quality_words(measured.before, measured.quality),
    ]
    gain = reestimation_gain(kept.stage)
    if gain is not None and gain > 0.0005:
        parts.append(f"New batch-norm statistics alone brought {gain:+.4f} (selection samples, no labels).")
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
