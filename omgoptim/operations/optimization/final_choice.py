"""The end of an optimize run: the best points against the original on the evaluation data, and the one delivered."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import Quality, compare_quality, read_outputs
from omgoptim.measure.timing import Timing
from omgoptim.models.artifact import Manifest
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.goal import Goal, Missed
from omgoptim.operations.optimization.points import Point, speeds
from omgoptim.operations.quantization.selection import Preference
from omgoptim.operations.report_records import gains, measurement
from omgoptim.operations.timing import OVERLOADED, RaceResult, fraction_progress, full_race
from omgoptim.operations.verdict import passes
from omgoptim.reports import Gains, Measurement
from omgoptim.requests import OptimizeRequest

FINALISTS = 5
"""Most points that are measured in full."""

MEASURED = (0.82, 0.97)
"""Fractions of the run between which the final measurement moves its progress."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """A point measured in full, with its quality on the evaluation data."""

    point: Point
    timing: Timing
    quality: Quality
    before: Measurement
    after: Measurement
    gains: Gains
    missed: list[Missed]

    @property
    def slug(self) -> str:
        """The name that `pick` takes."""
        return re.sub(r"[^a-z0-9]+", "-", self.point.name.lower()).strip("-")[:80]


@dataclass(frozen=True, slots=True)
class Chosen:
    """All finalists in the order of delivery, which was fixed before the evaluation data was read."""

    finalists: list[Finalist]
    winner: Finalist
    holds: bool
    """True if the winner passes the quality guard on the evaluation data and meets every target."""
    load: float


def pick_finalists(
    points: Sequence[Point], goal: Goal, preference: Preference, singles: Sequence[Point]
) -> list[Point]:
    """Return the points worth measuring in full, by what the selection samples and single launches say.

    The best of what quantization alone gave is always among them, and so is the point that loses least.
    """
    merits = {
        id(point): _merit(speed, point.size_bytes, preference)
        for speed, point in zip(speeds(points), points, strict=True)
    }
    within = [point for point in points if point.cautious_drop <= goal.max_quality_drop]
    ranked = sorted(within, key=lambda point: merits[id(point)], reverse=True)
    chosen = ranked[: FINALISTS - 2]
    alone = [point for point in ranked if any(point is other for other in singles)]
    safest = max(points, key=lambda point: (-point.cautious_drop, merits[id(point)]))
    for further in (*alone[:1], safest):
        if not any(further is point for point in chosen):
            chosen.append(further)
    return chosen


def measure_finalists(
    request: OptimizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    points: Sequence[Point],
    goal: Goal,
    preference: Preference,
) -> Chosen:
    """Time the original and the finalists in turns, read the evaluation data once, and choose.

    Raises:
        OmgoptimError: no finalist could be measured.
    """
    targets = [context.work / "final" / str(index) for index in range(len(points) + 1)]

    def outputs(index: int, process: MeasuringProcess) -> None:
        whose = ["the original", *(point.name for point in points)][index]
        process.run_samples(loaded.eval_folder, targets[index], fraction_progress(context, f"evaluating {whose}"))

    folders = [loaded.baseline, *(point.artifact for point in points)]
    doing = "measuring the finalists against the original"
    raced = full_race(folders, loaded.bench, request.timing, request.seed, context, MEASURED, doing, outputs)
    entries = []
    failure: OmgoptimError | None = None
    for point, timing, target in zip(points, raced.timings[1:], targets[1:], strict=True):
        if isinstance(timing, Timing):
            entries.append((point, timing, target))
        else:
            failure = timing
    ordered = sorted(entries, key=lambda entry: _place(entry[0], entry[1], loaded, goal, preference, raced))
    finalists = []
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
    for point, timing, target in ordered:  # evaluation data is read from here on
        try:
            quality = compare_quality(metric, original, read_outputs(target), loaded.evaluation.targets, request.seed)
        except OmgoptimError as error:  # infinite outputs, say
            failure = error
            continue
        finalists.append(_finalist(point, timing, quality, loaded, goal, raced))
    if not finalists:
        raise failure or TechniqueError("no step made an artifact that could be measured")
    winner = next((one for one in finalists if _reaches(one, goal)), None)
    if winner is not None:
        return Chosen(finalists, winner, True, raced.load)
    holding = [one for one in finalists if passes(one.quality, goal.max_quality_drop)]
    return Chosen(finalists, (holding or finalists)[0], False, raced.load)


def deliver(chosen: Chosen, context: RunContext) -> dict[str, Path]:
    """Copy the winner's artifact and those of the other finalists into the run's folder, each whole; place by slug."""
    shutil.rmtree(context.alternatives, ignore_errors=True)  # of a run that was cut off and resumed
    context.alternatives.mkdir()
    places = {}
    for one in chosen.finalists:
        place = context.artifact if one is chosen.winner else context.alternatives / one.slug
        scratch = context.work / "deliver" / one.slug
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(one.point.artifact, scratch)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(scratch, place)
        places[one.slug] = place
    return places


def _finalist(
    point: Point, timing: Timing, quality: Quality, loaded: LoadedModel, goal: Goal, raced: RaceResult
) -> Finalist:
    count = loaded.evaluation.count
    first = raced.timing(0)
    before = measurement(loaded.baseline, first, loaded.bench, quality.before, quality.metric, count)
    after = measurement(point.artifact, timing, loaded.bench, quality.after, quality.metric, count)
    gained = gains(before, after, timing, quality, raced.load)
    return Finalist(point, timing, quality, before, after, gained, goal.missed(after))


def _reaches(one: Finalist, goal: Goal) -> bool:
    return passes(one.quality, goal.max_quality_drop) and not one.missed


def _place(
    point: Point, timing: Timing, loaded: LoadedModel, goal: Goal, preference: Preference, raced: RaceResult
) -> tuple[bool, float, float, float]:
    """The key of the order of delivery: targets first, then the guard on the selection samples, then merit."""
    seen = measurement(point.artifact, timing, loaded.bench, None, None, None)
    missed = goal.missed(seen)
    furthest = missed[0].factor if missed else 1.0
    within = point.cautious_drop <= goal.max_quality_drop
    known = raced.load <= OVERLOADED and timing.speedup is not None
    speedup = timing.speedup.value if known and timing.speedup else point.work_ratio
    merit, size_ratio = _merit(speedup, Manifest.read(point.artifact).size_bytes, preference)
    return not within, furthest, -merit if within else point.cautious_drop, -size_ratio


def _merit(speed: float, size_bytes: int | None, preference: Preference) -> tuple[float, float]:
    """Return the preferred merit and the size ratio, which is also known on a busy machine."""
    size_ratio = preference.baseline_bytes / (size_bytes or preference.baseline_bytes or 1)
    return preference.merit_of(speed, size_ratio), size_ratio
