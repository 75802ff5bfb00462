"""Taking weights away and training the rest back, round by round; each stage is kept, so that a cut run goes on."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.operations.compression_job import Job
from omgoptim.operations.datasets import one_sample
from omgoptim.operations.per_sample_check import refuse_partial
from omgoptim.operations.report_records import finite
from omgoptim.operations.rounds.checkpoint import Stage, note_training, read_stage, training_of, write_stage
from omgoptim.operations.verdict import holds
from omgoptim.reports import Change, Round, Training
from omgoptim.requests import FactorizeRequest, PruneRequest
from omgoptim.techniques.registry import Outcome
from omgoptim.training.adapters import recovering
from omgoptim.training.batch_norm import reestimate
from omgoptim.training.config import TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.loop import fit
from omgoptim.training.small_data import config_for_data
from omgoptim.training.zero_masks import ZeroMasks

COLLAPSE = 0.5
"""A round that loses this fraction of the original's quality is not built upon."""

RoundsJob = Job[PruneRequest | FactorizeRequest]
"""A run that takes away and trains back."""


Take = Callable[[nn.Module, tuple[float, float]], Outcome]
"""Takes weights away from the copy it is given; the second argument is its part of the run's progress."""


def run_round(job: RoundsJob, number: int, amount: float | None, start: nn.Module, take: Take, held: bool) -> Stage:
    """One round from the module that the last one ended with; what was done of it before is not done again.

    Args:
        start: the module to take from; not changed.
        held: whether weights that are zero after taking stay zero while training.
    """
    folder = job.context.checkpoints / f"round-{number}"
    done = read_stage(folder / "done", job.original)
    if done is not None:
        return done
    stage = read_stage(folder / "taken", job.original)
    if stage is None:
        module = copy.deepcopy(start)
        outcome = take(module, job.span(number, (0.0, 0.4)))
        selection, loaded = job.datasets.selection, job.loaded
        refuse_partial(module, job.original, selection, loaded.signature, loaded.device)
        stage = Stage(module, Round(number=number, amount=amount), outcome)
        _settle(job, stage)
        write_stage(folder / "taken", stage, job.original)
    if job.datasets.epochs:
        _train(job, stage, number, folder / "training", held)
    stage.record = stage.record.model_copy(update={"quality_drop": finite(job.drop(stage.quality))})
    write_stage(folder / "done", stage, job.original)
    for finished in ("taken", "training"):
        shutil.rmtree(folder / finished, ignore_errors=True)
    return stage


def _settle(job: RoundsJob, stage: Stage) -> None:
    """Judge what was taken away, estimate batch-norm statistics again, keep the better of the two, and count."""
    judge, module = job.datasets.judge, stage.module
    taken = judge.score(module)
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    real = job.loaded.data.real  # the statistics of random inputs would be wrong for any other
    layers = reestimate(module, job.loaded.signature, job.datasets.statistics) if real else 0
    again = judge.score(module) if layers else taken
    if again < taken:  # what was fitted to the old statistics may be better off with them
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
    stage.quality = max(again, taken)
    args, kwargs = one_sample(job.loaded)
    params, nonzero = count_params(module)
    told = {
        "params": params,
        "nonzero_params": nonzero,
        "macs": count_macs(module, args, kwargs).macs,
        "quality_taken": finite(taken),
        "quality_reestimated": finite(again) if layers else None,
    }
    stage.record = stage.record.model_copy(update=told)


def _train(job: RoundsJob, stage: Stage, number: int, folder: Path, held: bool) -> None:
    request, datasets, device = job.request, job.datasets, job.loaded.device
    start, end = job.span(number, (0.4, 1.0))
    masks = ZeroMasks.of(stage.module, [change.path for change in stage.outcome.changed]) if held else None
    check = datasets.loss.check if datasets.loss is not None else lambda _target: None
    plan = TrainingConfig.of(request, datasets.epochs, device, request.seed)
    plan = config_for_data(plan, request, datasets.batches, check)

    def progress(told: str, done: float | None) -> None:
        doing = told if job.rounds == 1 else f"round {number} of {job.rounds}: {told}"
        job.context.progress(doing, None if done is None else start + (end - start) * done)

    with recovering(stage.module, request.recover, request.lora_rank, request.lora_alpha, masks) as trainable:
        fitted = fit(
            trainable,
            datasets.batches,
            datasets.loss,
            plan,
            datasets.judge,
            checkpoints=folder,
            progress=progress,
            teacher=job.original if request.distill else None,
            distillation=DistillationLoss(request.temperature, request.alpha) if request.distill else None,
            masks=masks,
            round_number=number,
            score=stage.quality,
        )
    note_training(stage, fitted)
    if request.recover == "lora" or fitted.quality is None:  # adapters were merged since: the sum is another one
        stage.quality = datasets.judge.score(stage.module)
    stage.record = stage.record.model_copy(update={"quality_trained": finite(stage.quality)})


@dataclass(frozen=True, slots=True)
class Kept:
    """The round whose model becomes the artifact, and all that there were."""

    stage: Stage
    stages: list[Stage]
    rewound: bool
    """Whether a later round went further and was undone, because it lost more than the guard allows."""


def keep(job: RoundsJob, stages: list[Stage]) -> Kept:
    """The last round within the guard; if none is, the one that lost least. By the selection samples."""
    guard = job.request.max_quality_drop
    within = [stage for stage in stages if holds(job.drop(stage.quality), guard)]
    chosen = within[-1] if within else max(stages, key=lambda stage: (stage.quality, stage.record.number))
    last = stages[-1]
    for stage in stages:
        told = {"kept": stage is chosen, "why": _why(job, stage, chosen, last)}
        stage.record = stage.record.model_copy(update=told)
    return Kept(chosen, stages, chosen is not last)


def _why(job: RoundsJob, stage: Stage, chosen: Stage, last: Stage) -> str:
    drop, guard = job.drop(stage.quality), job.request.max_quality_drop
    if stage is chosen and holds(drop, guard):
        return "the goal, within the guard" if stage is last else "the last round within the guard"
    if stage is chosen:
        return "no round held the guard; this one lost least"
    if collapsed(job, stage):
        return "collapsed: undone"
    return "a step on the way" if holds(drop, guard) else f"lost {drop:.4f}, more than the guard {guard:g}"


def collapsed(job: RoundsJob, stage: Stage) -> bool:
    """Whether a round lost so much that building on it is pointless."""
    original = job.datasets.judge.original
    return not math.isfinite(stage.quality) or job.drop(stage.quality) > COLLAPSE * max(abs(original), 1e-6)


def merged(stages: list[Stage], kept: Stage) -> Outcome:
    """What the rounds up to the kept one changed together: each path from its first state to its last.

    A layer that only reads fewer channels than before stays among those skipped, with its reason.
    """
    changes: dict[tuple[str, str], Change] = {}
    for stage in stages[: stages.index(kept) + 1]:
        for change in stage.outcome.changed:
            first = changes.get((change.path, change.what), change)
            changes[change.path, change.what] = change.model_copy(update={"before": first.before})
    touched = {path for path, what in changes if what != "input channels"}
    skipped = [skip for skip in kept.outcome.skipped if skip.path not in touched]
    return Outcome(list(changes.values()), skipped, kept.outcome.notes)


def training_record(job: RoundsJob, stages: list[Stage]) -> Training | None:
    """What was trained over all rounds; None if nothing was."""
    request, datasets = job.request, job.datasets
    plan = TrainingConfig.of(request, datasets.epochs, job.loaded.device, request.seed)
    return training_of(stages, plan, datasets.judge.metric.name)


def reestimation_gain(kept: Stage) -> float | None:
    """What the new batch-norm statistics of the kept round brought by themselves; None without batch normalization."""
    taken, again = kept.record.quality_taken, kept.record.quality_reestimated
    return None if taken is None or again is None else again - taken
