"""What a run of rounds ends with: the kept round's model, what was reached, and what training did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from omgoptim.operations.report_builder import FinalModel
from omgoptim.operations.rounds.loop import Kept, RoundsJob, merged, reestimation_gain, training_record
from omgoptim.operations.save_and_measure import Measured
from omgoptim.reports import SensitivityPoint

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


def final_model_of(job: RoundsJob, kept: Kept, goal: Goal, sensitivity: Sequence[SensitivityPoint]) -> FinalModel:
    """The ending of a run whose artifact is the kept round's model."""
    training = training_record(job, kept.stages)
    warnings = list(kept.stage.warnings)
    if training is not None and job.request.recover == "lora":
        warnings.append(LORA_WORDS)
    gain = reestimation_gain(kept.stage)
    brought = gain is not None and gain > 0.0005
    words = f"New batch-norm statistics alone brought {gain:+.4f} (selection samples, no labels)." if brought else ""
    return FinalModel(
        name=goal.name,
        module=kept.stage.module,
        loaded=job.loaded,
        changes=merged(kept.stages, kept.stage),
        missed=lambda measured: _rewound(job, kept) or goal.missed(measured),
        facts=goal.facts,
        closing=[words],
        warnings=warnings,
        rounds=[stage.record for stage in kept.stages],
        training=training,
        sensitivity=list(sensitivity),
    )


def _rewound(job: RoundsJob, kept: Kept) -> str | None:
    """That the artifact is an earlier round than was asked for, and why."""
    if not kept.rewound:
        return None
    last, chosen = kept.stages[-1].record, kept.stage.record
    lost = "collapsed" if last.quality_drop is None else f"loses {last.quality_drop:.4f} on the selection samples"
    goal = kept.stages[-1].record.amount or 0.0
    amount = "" if chosen.amount is None else f" (amount {chosen.amount:.3g} of {goal:.3g})"
    return (
        f"round {last.number} {lost}, more than {job.request.max_quality_drop:g}: round {chosen.number} is kept{amount}"
    )
