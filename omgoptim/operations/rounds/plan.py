"""Dry run of prune and factorize: the technique on a temporary copy, without training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.operations.compression_job import WORK, AnyJob, applied
from omgoptim.operations.datasets import one_sample
from omgoptim.operations.next_steps import repeat_of, same_arguments, step
from omgoptim.operations.report_records import environment, shown_request
from omgoptim.operations.rounds.loop import RoundsJob
from omgoptim.reports import EfficiencyReport, Round
from omgoptim.requests import Params
from omgoptim.training.config import MIN_STEPS_PER_EPOCH, TrainingConfig, config_for_data

MOST_BATCHES = 100_000
"""Maximum number of batches of an epoch that are counted."""


def plan_report(verb: str, job: RoundsJob, steps: Sequence[Params]) -> EfficiencyReport:
    """Report the changes of the last round and the amount of training.

    Raises:
        OmgoptimError: the technique does not support the model.
    """
    request, context, loaded = job.request, job.context, job.loaded
    context.progress("applying the technique to a copy", WORK[0])
    module = copy.deepcopy(job.original)
    outcome = applied(job, module, steps[-1], job.module_run())
    args, kwargs = one_sample(loaded)
    params, nonzero = count_params(module)
    last = Round(number=len(steps), params=params, nonzero_params=nonzero, macs=count_macs(module, args, kwargs).macs)
    output = {"output": request.output} if request.output else {}
    layers = len({change.path for change in outcome.changed})
    return EfficiencyReport(
        outcome="ok",
        summary=f"Dry run: {verb} would change {layers} layers in {len(steps)} "
        f"round{'s' if len(steps) > 1 else ''}, to {params:,} parameters ({nonzero:,} nonzero)"
        f"{_training_phrase(job, len(steps))}. {' '.join(outcome.notes)} Quality and speed are not known before it is "
        "done.",
        warnings=[*loaded.notes, *job.datasets.notes],
        next_steps=[step(verb, same_arguments(request) | output, "run what was planned")],
        verb=verb,
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, None),
        changed=outcome.changed,
        skipped=outcome.skipped,
        rounds=[last],
        macs_check=loaded.macs.check if loaded.macs else None,
        lineage=list(loaded.lineage[:-1]),
        repeat=repeat_of(verb, request),
    )


def batches_in_epoch(job: AnyJob) -> int:
    """Count the batches of one epoch, up to `MOST_BATCHES`."""
    batches, loss = job.datasets.batches, job.datasets.loss
    plan = TrainingConfig.of(job.request, 1, job.loaded.device, job.request.seed)
    count = sum(1 for _ in itertools.islice(batches.epoch(plan.batch), MOST_BATCHES))
    if count >= MIN_STEPS_PER_EPOCH:
        return count
    plan = config_for_data(plan, job.request, batches, loss.check if loss is not None else lambda _target: None)
    return batches.survey(plan.batch, plan.seed, lambda _target: None)[0]


def _training_phrase(job: RoundsJob, rounds: int) -> str:
    epochs = job.datasets.epochs
    if not epochs:
        return ", without training"
    batches = batches_in_epoch(job)
    each = " after each" if rounds > 1 else ""
    return f", with {epochs} epoch{'s' if epochs > 1 else ''} of {batches:,} batches{each}"
