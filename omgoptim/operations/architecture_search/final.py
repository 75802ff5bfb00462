"""The end of a search: the best trials against the original in one paired measurement on the evaluation data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import Quality, compare_quality, read_outputs
from omgoptim.measure.timing import Timing
from omgoptim.operations.compression_job import Job
from omgoptim.operations.optimization.goal import Goal, Missed
from omgoptim.operations.report_records import gains, measurement
from omgoptim.operations.timing import OVERLOADED, RaceResult, fraction_progress, full_race
from omgoptim.operations.verdict import passes
from omgoptim.reports import Gains, Measurement
from omgoptim.requests import SearchRequest

MEASURED = (0.82, 0.97)
"""Fractions of the run between which the final measurement moves its progress."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A trial that was trained to the end."""

    name: str
    number: int
    artifact: Path
    quality: float
    """On the selection samples."""
    by_rule: bool
    """True if the proposal rule chose it, False if the random control did."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """An entry measured in full, with its quality on the evaluation data."""

    entry: Entry
    timing: Timing
    quality: Quality
    before: Measurement
    after: Measurement
    gains: Gains
    missed: list[Missed]

    @property
    def slug(self) -> str:
        """The name that `pick` takes."""
        return self.entry.name.replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Chosen:
    """All finalists in the order of delivery, which was fixed before the evaluation data was read."""

    finalists: list[Finalist]
    winner: Finalist
    holds: bool
    """True if the winner passes the quality guard on the evaluation data and meets every target."""
    load: float


def measure_finalists(job: Job[SearchRequest], baseline: Path, entries: Sequence[Entry]) -> Chosen:
    """Time the original and the finalists in turns, read the evaluation data once, and choose.

    The order: those that meet the targets first, then by quality on the selection samples.

    Raises:
        OmgoptimError: no finalist could be measured.
    """
    request, context, loaded = job.request, job.context, job.loaded
    targets = [context.work / "final" / str(index) for index in range(len(entries) + 1)]

    def outputs(index: int, process: MeasuringProcess) -> None:
        whose = ["the original", *(entry.name for entry in entries)][index]
        process.run_samples(loaded.eval_folder, targets[index], fraction_progress(context, f"evaluating {whose}"))

    folders = [baseline, *(entry.artifact for entry in entries)]
    doing = "measuring the finalists against the original"
    raced = full_race(folders, loaded.bench, request.timing, request.seed, context, MEASURED, doing, outputs)
    original = read_outputs(targets[0])
    metric = resolve_metric(
        loaded.metric,
        loaded.signature,
        original,
        loaded.evaluation.targets,
        loaded.policy,
        request.time_limit_s,
        loaded.outputs,
    )
    finalists: list[Finalist] = []
    failure: OmgoptimError | None = None
    for entry, timing, target in zip(entries, raced.timings[1:], targets[1:], strict=True):
        if not isinstance(timing, Timing):
            failure = timing
            continue
        try:
            quality = compare_quality(metric, original, read_outputs(target), loaded.evaluation.targets, request.seed)
        except OmgoptimError as error:  # infinite outputs, say
            failure = error
            continue
        finalists.append(_finalist(job, baseline, entry, timing, quality, raced))
    if not finalists:
        raise failure or TechniqueError("no trial gave an artifact that could be measured")
    finalists.sort(key=_place)
    winner = next((one for one in finalists if not one.missed and passes(one.quality, request.max_quality_drop)), None)
    return Chosen(finalists, winner or finalists[0], winner is not None, raced.load)


def deliver(chosen: Chosen, job: Job[SearchRequest]) -> dict[str, Path]:
    """Copy the winner's artifact and the other finalists' into the run's folder, each whole; place by slug."""
    context = job.context
    shutil.rmtree(context.alternatives, ignore_errors=True)  # of a run that was cut off and resumed
    context.alternatives.mkdir()
    places = {}
    for one in chosen.finalists:
        place = context.artifact if one is chosen.winner else context.alternatives / one.slug
        scratch = context.work / "deliver" / one.slug
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(one.entry.artifact, scratch)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(scratch, place)
        places[one.slug] = place
    return places


def _place(one: Finalist) -> tuple[bool, float, float]:
    """The key of the order of delivery; nothing of it comes from the evaluation data."""
    furthest = one.missed[0].factor if one.missed else 1.0
    return bool(one.missed), furthest, -one.entry.quality


def _finalist(
    job: Job[SearchRequest], baseline: Path, entry: Entry, timing: Timing, quality: Quality, raced: RaceResult
) -> Finalist:
    loaded = job.loaded
    count = loaded.evaluation.count
    before = measurement(baseline, raced.timing(0), loaded.bench, quality.before, quality.metric, count)
    after = measurement(entry.artifact, timing, loaded.bench, quality.after, quality.metric, count)
    gained = gains(before, after, timing, quality, raced.load)
    return Finalist(entry, timing, quality, before, after, gained, _missed(job.request, after, gained, raced.load))


def _missed(request: SearchRequest, after: Measurement, gained: Gains, load: float) -> list[Missed]:
    """Return the targets that are not met; a time of an overloaded machine is no miss."""
    quiet = load <= OVERLOADED
    size, memory = request.target_size_mb, request.target_memory_mb
    goal = Goal(
        request.max_quality_drop,
        request.target_latency_ms if quiet else None,
        None if size is None else size * 1e6,
        None if memory is None else memory * 1e6,
    )
    missed = goal.missed(after)
    wanted = request.target_speedup
    if wanted is not None and gained.speedup is not None and gained.speedup < wanted and after.latency_ms_p50:
        allowed = after.latency_ms_p50 * gained.speedup / wanted
        missed.append(Missed(f"latency for a speedup of {wanted:g}:", after.latency_ms_p50, allowed, "ms"))
    return sorted(missed, key=lambda one: -one.factor)
