"""Final model of a run of rounds: the chosen round, its goal, and its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from omgoptim.operations.report_builder import FinalModel
from omgoptim.operations.rounds.loop import ChosenRound, RoundsJob, merged, reestimation_gain, training_record
from omgoptim.operations.save_and_measure import MeasuredArtifact
from omgoptim.reports import SensitivityPoint

LORA_NOTE = (
    "LoRA adapters were trained and merged into the weights: they save memory in training, not time at inference"
)


@dataclass(frozen=True, slots=True)
class CompressionGoal:
    """Goal of the run: its description, and a check by the final measurement."""

    name: str
    """For the verdict: `structured pruning, 50 % of the channels`."""
    missed: Callable[[MeasuredArtifact], str | None] = lambda _: None
    """Reason by the measurement why the goal was missed; None if it was reached."""
    facts: Sequence[str] = field(default_factory=tuple)
    """Sentences of the technique for the summary."""


def final_model_of(
    job: RoundsJob, kept: ChosenRound, goal: CompressionGoal, sensitivity: Sequence[SensitivityPoint]
) -> FinalModel:
    """Build the final model from the chosen round."""
    training = training_record(job, kept.states)
    warnings = list(kept.state.warnings)
    if training is not None and job.request.recover == "lora":
        warnings.append(LORA_NOTE)
    gain = reestimation_gain(kept.state)
    improved = gain is not None and gain > 0.0005
    words = (
        f"Re-estimating batch-norm statistics alone changed quality by {gain:+.4f} on the selection samples."
        if improved
        else ""
    )
    return FinalModel(
        name=goal.name,
        module=kept.state.module,
        loaded=job.loaded,
        changes=merged(kept.states, kept.state),
        missed=lambda measured: _rewound_reason(job, kept) or goal.missed(measured),
        facts=goal.facts,
        closing=[words],
        warnings=warnings,
        rounds=[state.record for state in kept.states],
        training=training,
        sensitivity=list(sensitivity),
    )


def _rewound_reason(job: RoundsJob, kept: ChosenRound) -> str | None:
    """Return the reason why an earlier round than the last was chosen; None if the last was."""
    if not kept.rewound:
        return None
    last, chosen = kept.states[-1].record, kept.state.record
    lost = "collapsed" if last.quality_drop is None else f"loses {last.quality_drop:.4f} on the selection samples"
    goal = kept.states[-1].record.amount or 0.0
    amount = "" if chosen.amount is None else f" (amount {chosen.amount:.3g} of {goal:.3g})"
    return (
        f"round {last.number} {lost}, more than {job.request.max_quality_drop:g}: round {chosen.number} is kept{amount}"
    )
