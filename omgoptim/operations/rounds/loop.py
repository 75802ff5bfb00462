"""Compression in rounds, each followed by training and saved as a checkpoint; the chosen round is the final model."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from omgoptim.measure.macs import count_macs
from omgoptim.measure.quality import Quality
from omgoptim.measure.size import count_params
from omgoptim.operations.compression_job import Job
from omgoptim.operations.datasets import SELECTION_SAMPLES, one_sample
from omgoptim.operations.final_measurement import MeasuredArtifact
from omgoptim.operations.per_sample_check import refuse_partial
from omgoptim.operations.report_builder import FinalModel
from omgoptim.operations.report_records import finite
from omgoptim.operations.rounds.checkpoint import RoundState, read_round, record_training, training_of, write_round
from omgoptim.operations.verdict import holds
from omgoptim.reports import Change, Round, SensitivityPoint, Training
from omgoptim.requests import FactorizeRequest, PruneRequest
from omgoptim.techniques.registry import Outcome
from omgoptim.training.batch_norm import reestimate
from omgoptim.training.config import TrainingConfig, config_for_data
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.loop import Objective, Trainer, TrainingRound
from omgoptim.training.trainable_weights import ZeroMasks, recovering

COLLAPSE_DROP = 0.5
"""Quality drop, as a fraction of the original's quality, after which no further round runs: more compression only
loses more, and no guard allows half of the quality."""

MIN_REPORTED_GAIN = 0.5 / SELECTION_SAMPLES
"""Minimum quality gain by batch-norm re-estimation that is reported: smaller than one of the selection samples."""

RoundsJob = Job[PruneRequest | FactorizeRequest]
"""A run of prune or factorize."""


Compress = Callable[[nn.Module, tuple[float, float]], Outcome]
"""Compresses the module that it is given; the second argument is its span of the run's progress."""


def run_round(
    job: RoundsJob, number: int, amount: float | None, start: nn.Module, compress: Compress, keep_zeros: bool
) -> RoundState:
    """Run one round from the module of the previous one; resume from its checkpoints.

    `start` is not changed. `amount` is None where the request has a target instead. With `keep_zeros` zero weights stay
    zero in training.
    """
    folder = job.context.checkpoints / f"round-{number}"
    done = read_round(folder / "done", job.original)
    if done is not None:
        return done
    state = read_round(folder / "taken", job.original)
    if state is None:
        module = copy.deepcopy(start)
        outcome = compress(module, job.span(number, (0.0, 0.4)))
        selection, loaded = job.datasets.selection, job.loaded
        refuse_partial(module, job.original, selection, loaded.signature, loaded.device)
        state = RoundState(module, Round(number=number, amount=amount), outcome)
        _evaluate_compressed(job, state)
        write_round(folder / "taken", state, job.original)
    if job.datasets.epochs:
        _train(job, state, number, folder / "training", keep_zeros)
    state.record = state.record.model_copy(update={"quality_drop": finite(job.drop(state.quality))})
    write_round(folder / "done", state, job.original)
    for finished in ("training",) if job.rounds == 1 else ("taken", "training"):  # of one round it is the fallback
        shutil.rmtree(folder / finished, ignore_errors=True)
    return state


def _evaluate_compressed(job: RoundsJob, state: RoundState) -> None:
    """Evaluate the compressed module with and without re-estimated batch-norm statistics, keep the better; count."""
    evaluator, module = job.datasets.evaluator, state.module
    compressed = evaluator.score(module)
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    real = job.loaded.data.real  # the statistics of random inputs would be wrong for any other
    layers = reestimate(module, job.loaded.signature, job.datasets.statistics) if real else 0
    again = evaluator.score(module) if layers else compressed
    if again < compressed:  # weights fitted to the old statistics may work better with them
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
    state.quality = max(again, compressed)
    args, kwargs = one_sample(job.loaded)
    params, nonzero = count_params(module)
    update = {
        "params": params,
        "nonzero_params": nonzero,
        "macs": count_macs(module, args, kwargs).macs,
        "quality_taken": finite(compressed),
        "quality_reestimated": finite(again) if layers else None,
    }
    state.record = state.record.model_copy(update=update)


def _train(job: RoundsJob, state: RoundState, number: int, folder: Path, keep_zeros: bool) -> None:
    request, datasets, device = job.request, job.datasets, job.loaded.device

    masks = ZeroMasks.of(state.module, [change.path for change in state.outcome.changed]) if keep_zeros else None
    plan = TrainingConfig.of(request, datasets.epochs, device, request.seed)
    plan = config_for_data(plan, request, datasets.batches, Objective(datasets.loss).check)

    prefix = "" if job.rounds == 1 else f"round {number} of {job.rounds}: "
    progress = job.context.part(*job.span(number, (0.4, 1.0)), prefix)

    with recovering(state.module, request.recover, request.lora_rank, request.lora_alpha, masks) as trainable:
        objective = Objective(datasets.loss)
        if request.distill:
            objective = Objective(datasets.loss, job.original, DistillationLoss(request.temperature, request.alpha))
        trainer = Trainer(trainable, datasets.batches, objective, plan, datasets.evaluator)
        fitted = trainer.fit(TrainingRound(number, folder, masks, state.quality), progress, job.context.publish)
    record_training(state, fitted)
    if request.recover == "lora" or fitted.quality is None:  # adapters were merged since: the sum is another one
        state.quality = datasets.evaluator.score(state.module)
    state.record = state.record.model_copy(update={"quality_trained": finite(state.quality)})


@dataclass(frozen=True, slots=True)
class ChosenRound:
    """The round chosen as the artifact, and all rounds."""

    state: RoundState
    states: list[RoundState]
    rewound: bool
    """True if later rounds were discarded because they fail the quality guard."""
    fallbacks: Sequence[RoundState] = ()
    """Earlier rounds for where this one fails the guard on the evaluation data, in order."""
    failures: Sequence[str] = ()
    """Later rounds that failed it there, as text."""
    untrained: bool = False
    """True for the network before fine-tuning, of a single round."""

    def next(self, job: RoundsJob, quality: Quality) -> ChosenRound | None:
        """Return the next fallback for a failed quality on the evaluation data; None where none is left."""
        guard, number = job.request.max_quality_drop, self.state.record.number
        ruined = ", ".join(output.spec.name for output in quality.ruined)
        fault = f"ruins output {ruined}" if ruined else f"loses {quality.drop:.4f}, more than {guard:g},"
        words = f"{fault} on the evaluation data"
        if not self.fallbacks:
            before = None if len(self.states) > 1 or self.failures else _before_training(job, self.state)
            why = f"the fine-tuned network {words}: the next of the fixed order, the one before fine-tuning, was tried"
            return None if before is None else ChosenRound(before, [before], False, (), [why], True)
        following, *others = self.fallbacks
        for state in (self.state, following):
            kept = state is following
            why = "the next within the guard, in the order fixed on the selection samples" if kept else words
            state.record = state.record.model_copy(update={"kept": kept, "why": why})
        return ChosenRound(following, self.states, True, others, [*self.failures, f"round {number} {words}"])


def _before_training(job: RoundsJob, trained: RoundState) -> RoundState | None:
    """Return the only round without its training if that held the guard on the selection samples; else None."""
    if not any(epoch.best for epoch in trained.epochs):  # it has these weights
        return None
    state = read_round(job.context.checkpoints / f"round-{trained.record.number}" / "taken", job.original)
    if state is None or not holds(job.drop(state.quality), job.request.max_quality_drop):
        return None
    changes = {
        "kept": True,
        "why": "within the guard before training",
        "quality_trained": trained.record.quality_trained,
        "quality_drop": finite(job.drop(state.quality)),
    }
    record = state.record.model_copy(update=changes)
    epochs = [epoch.model_copy(update={"best": False}) for epoch in trained.epochs]
    return replace(trained, module=state.module, quality=state.quality, record=record, epochs=epochs)


def choose_round(job: RoundsJob, states: list[RoundState]) -> ChosenRound:
    """Choose the last round within the guard on the selection samples; if none, the one with the smallest loss.

    Its fallbacks are the round within the guard before it and the one that lost least: few, since each that is tried is
    a choice by the evaluation data.
    """
    guard = job.request.max_quality_drop
    within = [state for state in states if holds(job.drop(state.quality), guard)]
    chosen = within[-1] if within else max(states, key=lambda state: (state.quality, state.record.number))
    last = states[-1]
    for state in states:
        update = {"kept": state is chosen, "why": _why(job, state, chosen, last)}
        state.record = state.record.model_copy(update=update)
    earlier = [state for state in within if state is not chosen]
    safest = max(earlier, key=lambda state: (state.quality, -state.record.number), default=None)
    fallbacks = [state for state in reversed(earlier) if state is earlier[-1] or state is safest]
    return ChosenRound(chosen, states, chosen is not last, fallbacks)


def _why(job: RoundsJob, state: RoundState, chosen: RoundState, last: RoundState) -> str:
    drop, guard = job.drop(state.quality), job.request.max_quality_drop
    if state is chosen and holds(drop, guard):
        return "reaches the goal within the guard" if state is last else "the last round within the guard"
    if state is chosen:
        return "no round passed the quality guard; this one has the smallest loss"
    if has_collapsed(job, state):
        return "the quality collapsed: discarded"
    return "intermediate round" if holds(drop, guard) else f"lost {drop:.4f}, more than the guard {guard:g}"


def has_collapsed(job: RoundsJob, state: RoundState) -> bool:
    """Return whether a round lost so much quality that further rounds are pointless."""
    original = job.datasets.evaluator.original
    return not math.isfinite(state.quality) or job.drop(state.quality) > COLLAPSE_DROP * max(abs(original), 1e-6)


def merge_changes(states: list[RoundState], kept: RoundState) -> Outcome:
    """Merge the changes of all rounds up to the chosen one: each path from its first state to its last.

    A layer that only reads fewer channels than before stays among those skipped, with its reason.
    """
    changes: dict[tuple[str, str], Change] = {}
    for state in states[: states.index(kept) + 1]:
        for change in state.outcome.changed:
            first = changes.get((change.path, change.what), change)
            changes[change.path, change.what] = change.model_copy(update={"before": first.before})
    touched = {change.path for change in changes.values() if not change.indirect}
    skipped = [skip for skip in kept.outcome.skipped if skip.path not in touched]
    return Outcome(list(changes.values()), skipped, kept.outcome.notes)


def training_record(job: RoundsJob, states: list[RoundState]) -> Training | None:
    """Summarize the training of all rounds; None if nothing was trained."""
    request, datasets = job.request, job.datasets
    plan = TrainingConfig.of(request, datasets.epochs, job.loaded.device, request.seed)
    return training_of(states, plan, datasets.evaluator.metric.name)


def reestimation_gain(kept: RoundState) -> float | None:
    """Return the quality gain by re-estimated batch-norm statistics; None without batch normalization."""
    before, again = kept.record.quality_taken, kept.record.quality_reestimated
    return None if before is None or again is None else again - before


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
    job: RoundsJob,
    kept: ChosenRound,
    goal_of: Callable[[RoundState], CompressionGoal],
    sensitivity: Sequence[SensitivityPoint],
) -> FinalModel:
    """Build the final model from the chosen round."""
    goal = goal_of(kept.state)

    def fallback(failed: MeasuredArtifact) -> FinalModel | None:
        following = kept.next(job, failed.quality)
        return None if following is None else final_model_of(job, following, goal_of, sensitivity)

    training = training_record(job, kept.states)
    warnings = [*kept.state.warnings, *(() if kept.rewound else kept.failures)]
    if training is not None and job.request.recover == "lora":
        warnings.append(LORA_NOTE)
    gain = reestimation_gain(kept.state)
    improved = gain is not None and gain > MIN_REPORTED_GAIN
    words = (
        f"Re-estimating batch-norm statistics alone changed quality by {gain:+.4f} on the selection samples."
        if improved
        else ""
    )
    return FinalModel(
        name=f"{goal.name}, before fine-tuning" if kept.untrained else goal.name,
        module=kept.state.module,
        loaded=job.loaded,
        changes=merge_changes(kept.states, kept.state),
        missed=lambda measured: _rewound_reason(job, kept) or goal.missed(measured),
        facts=goal.facts,
        closing=[words],
        warnings=warnings,
        rounds=[state.record for state in kept.states],
        training=training,
        sensitivity=list(sensitivity),
        fallback=fallback,
    )


def _rewound_reason(job: RoundsJob, kept: ChosenRound) -> str | None:
    """Return the reason why an earlier round than the last was chosen; None if the last was."""
    if not kept.rewound:
        return None
    last, chosen = kept.states[-1].record, kept.state.record
    lost = "collapsed" if last.quality_drop is None else f"loses {last.quality_drop:.4f} on the selection samples"
    reasons = list(kept.failures)
    if not holds(job.drop(kept.states[-1].quality), job.request.max_quality_drop):
        reasons.insert(0, f"round {last.number} {lost}, more than {job.request.max_quality_drop:g}")
    amount = "" if chosen.amount is None else f" (amount {chosen.amount:.3g} of {last.amount or 0.0:.3g})"
    order = ", the next in an order fixed before the evaluation data was read," if kept.failures else ""
    return f"{'; '.join(reasons)}: round {chosen.number}{order} is kept{amount}"
