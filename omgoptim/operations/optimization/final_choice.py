"""The end of an optimize run: the best points against the original on the evaluation data, and the one delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.measure.timing import Timing
from omgoptim.models.manifest import Manifest
from omgoptim.operations.final_measurement import DeliveryRule, FinalChoice, FinalRace, MeasuredEntry, TimedEntry
from omgoptim.operations.goal import Goal, Missed
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.points import StepResult, speeds
from omgoptim.operations.quantization.selection import Preference
from omgoptim.operations.report_records import measurement
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Gains, Measurement

FINALISTS = 5
"""Most points that are measured in full."""

Finalist = MeasuredEntry[StepResult]
Chosen = FinalChoice[StepResult]


def pick_finalists(
    points: Sequence[StepResult],
    goal: Goal,
    preference: Preference,
    singles: Sequence[StepResult],
    most: int = FINALISTS,
) -> list[StepResult]:
    """Return the points worth measuring in full, by what the selection samples and single launches say.

    Points that meet the targets come first, or are nearest to them. Always among the points: the fastest, the best of
    what quantization alone gave, and the one that loses least.

    Args:
        points: all results so far.
        goal: the guard and the targets.
        preference: order by time and size.
        singles: results of quantization alone.
        most: as many as the time left allows; never fewer than the best and those that are always among them.
    """
    speed_of = {id(point): speed for speed, point in zip(speeds(points), points, strict=True)}
    merits = {id(point): _merit(speed_of[id(point)], point.size_bytes, preference) for point in points}
    within = [point for point in points if point.cautious_drop <= goal.max_quality_drop]
    ranked = sorted(within, key=lambda point: (-point.overshoot(goal), merits[id(point)]), reverse=True)
    chosen = ranked[: max(1, most - 3)]
    fastest = sorted(within, key=lambda point: speed_of[id(point)], reverse=True)
    alone = [point for point in ranked if any(point is other for other in singles)]
    safest = max(points, key=lambda point: (-point.cautious_drop, merits[id(point)]))
    for further in (*fastest[:1], *alone[:1], safest):
        if not any(further is point for point in chosen):
            chosen.append(further)
    return chosen


@dataclass(frozen=True, slots=True)
class DeliveryOrder(DeliveryRule[StepResult]):
    """Order in which finalists are delivered, from times, sizes and selection samples."""

    loaded: LoadedModel
    goal: Goal
    preference: Preference

    def order(self, race: FinalRace[StepResult]) -> list[TimedEntry[StepResult]]:
        """Return the finalists in the order of preference."""
        return sorted(race.timed, key=lambda one: self.place(one.entry, one.timing, race))

    def place(self, point: StepResult, timing: Timing, race: FinalRace[StepResult]) -> tuple[float, ...]:
        """Return the key of a finalist, smaller for a better one.

        The guard comes first, then the targets, then whether it is slower than quantization alone, which the balanced
        preference would accept for a smaller file, then merit.
        """
        seen = measurement(point.artifact, timing, self.loaded.bench, None, None, None)
        missed = self.goal.missed(seen, race.load)
        furthest = missed[0].factor if missed else 1.0
        within = self._holds(point)
        known = race.load <= OVERLOADED and timing.speedup is not None
        speedup = timing.speedup.value if known and timing.speedup else point.work_ratio
        slower = known and self.preference.prefer == "balanced" and is_slower(timing, self._alone(race))
        merit, size_ratio = _merit(speedup, Manifest.read(point.artifact).size_bytes, self.preference)
        return not within, furthest, slower, -merit if within else point.cautious_drop, -size_ratio

    def missed(self, after: Measurement, _gained: Gains, race: FinalRace[StepResult]) -> list[Missed]:
        """Return the targets that a measured finalist does not meet."""
        return self.goal.missed(after, race.load)

    def _holds(self, point: StepResult) -> bool:
        return point.cautious_drop <= self.goal.max_quality_drop

    def _alone(self, race: FinalRace[StepResult]) -> list[Timing]:
        """Return the timings of quantization alone, within the guard on the selection samples."""
        return [one.timing for one in race.timed if one.entry.quantized_alone and self._holds(one.entry)]


def is_slower(timing: Timing, others: Sequence[Timing]) -> bool:
    """Return whether an artifact is slower than the fastest of others: its interval lies below theirs.

    Without intervals, as of a single launch, nothing is slower.
    """
    lows = [other.speedup.low for other in others if other.speedup and other.speedup.low is not None]
    high = timing.speedup.high if timing.speedup else None
    return high is not None and high < max(lows, default=0.0)


def _merit(speed: float, size_bytes: int | None, preference: Preference) -> tuple[float, float]:
    """Return the preferred merit and the size ratio, which is also known on a busy machine."""
    size_ratio = preference.baseline_bytes / (size_bytes or preference.baseline_bytes or 1)
    return preference.merit_of(speed, size_ratio), size_ratio
