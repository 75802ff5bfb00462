"""The end of an optimize run: the best points against the original on the evaluation data, and the one delivered."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.measure.timing import Timing
from omgoptim.models.artifact import Manifest
from omgoptim.operations.context import RunContext
from omgoptim.operations.final_measurement import FinalChoice, MeasuredEntry, Place, measure_entries
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.goal import Goal, Missed
from omgoptim.operations.optimization.points import Point, speeds
from omgoptim.operations.quantization.selection import Preference
from omgoptim.operations.report_records import measurement
from omgoptim.operations.timing import OVERLOADED, RaceResult
from omgoptim.reports import Gains, Measurement
from omgoptim.requests import OptimizeRequest

FINALISTS = 5
"""Most points that are measured in full."""


Finalist = MeasuredEntry[Point]
Chosen = FinalChoice[Point]


def pick_finalists(
    points: Sequence[Point], goal: Goal, preference: Preference, singles: Sequence[Point], most: int = FINALISTS
) -> list[Point]:
    """Return the points worth measuring in full, by what the selection samples and single launches say.

    The best of what quantization alone gave is always among them, and so is the point that loses least.

    Args:
        points: all results so far.
        goal: the guard and the targets.
        preference: order by time and size.
        singles: results of quantization alone.
        most: as many as the time left allows; never fewer than the best, the best of `singles` and the safest.
    """
    merits = {
        id(point): _merit(speed, point.size_bytes, preference)
        for speed, point in zip(speeds(points), points, strict=True)
    }
    within = [point for point in points if point.cautious_drop <= goal.max_quality_drop]
    ranked = sorted(within, key=lambda point: merits[id(point)], reverse=True)
    chosen = ranked[: max(1, most - 2)]
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
    limit_s: float,
) -> Chosen:
    """Time the original and the finalists in turns, read the evaluation data once, and choose.

    Args:
        request: with the guard, the timing and the seed.
        context: of the run.
        loaded: the original with its data.
        points: the finalists.
        goal: the guard and the targets.
        preference: order by time and size.
        limit_s: seconds within which the launches after the second must end.

    Raises:
        OmgoptimError: no finalist could be measured.
    """

    def place(point: Point, timing: Timing, raced: RaceResult) -> Place:
        return _place(point, timing, loaded, goal, preference, raced)

    def missed(after: Measurement, _gains: Gains, _raced: RaceResult) -> list[Missed]:
        return goal.missed(after)

    return measure_entries(request, context, loaded, loaded.baseline, points, place, missed, limit_s)


def _place(
    point: Point, timing: Timing, loaded: LoadedModel, goal: Goal, preference: Preference, raced: RaceResult
) -> Place:
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
