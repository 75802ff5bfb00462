"""Artifacts of the steps: their measurements, their Pareto front, and the final choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omgoptim.measure.timing import Timing
from omgoptim.models.manifest import Manifest
from omgoptim.operations.context import StepRun
from omgoptim.operations.final_measurement import FinalChoice, MeasuredEntry, PairedTimings, RankingRule, TimedEntry
from omgoptim.operations.goal import Goal, Missed
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.selection import Preference
from omgoptim.operations.report_records import measurement_record
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Gains, Measurement


@dataclass(slots=True, eq=False)
class StepResult:
    """Artifact of a step, with its measurements on the selection samples."""

    name: str
    verb: str
    run: StepRun
    artifact: Path
    parent: StepResult | None
    speedup: float | None
    """Latency of the original over this one's, from single launches; None where the machine was too busy to tell."""
    work_ratio: float
    """MACs of the original over this one's: what is compared where a speedup is not known."""
    size_bytes: int
    quality: float
    drop: float
    """Quality of the original less this one's."""
    cautious_drop: float
    """The drop with a margin for what so many samples cannot tell."""
    seconds: float
    expected_speedup: float | None = None
    status: Literal["kept", "rolled_back"] = "rolled_back"
    why: str = ""
    ruined: bool = False
    """An output is ruined that the metric does not show; the cautious drop is then above any guard."""
    measured: Measurement | None = None
    """By a single launch."""

    @property
    def chain(self) -> list[StepResult]:
        """The points it was made from, the first step first, itself last."""
        return [*(self.parent.chain if self.parent else []), self]

    def overshoot(self, goal: Goal) -> float:
        """Return measured over target of the target that is missed furthest; 1 if none is."""
        if self.measured is None:
            return 1.0
        missed = goal.missed(self.measured, 0.0 if self.speedup is not None else 1.0)
        return missed[0].factor if missed else 1.0

    @property
    def is_quantized_original(self) -> bool:
        """True if it is the original, quantized."""
        return self.verb == "quantize" and self.parent is None


def comparable_speeds(points: Sequence[StepResult]) -> list[float]:
    """Return the speeds of points relative to the original: measured, or all by their work if one was not."""
    measured = [point.speedup for point in points if point.speedup is not None]
    return measured if len(measured) == len(points) else [point.work_ratio for point in points]


def pareto_points(points: Sequence[StepResult]) -> list[StepResult]:
    """Return the points that no other beats or equals in speed, size and drop at once; of equal ones the first."""
    costs = [(-s, p.size_bytes, p.drop) for s, p in zip(comparable_speeds(points), points, strict=True)]
    front = []
    for index, point in enumerate(points):
        mine = costs[index]
        beaten = any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and (other != mine or place < index)
            for place, other in enumerate(costs)
            if place != index
        )
        if not beaten:
            front.append(point)
    return front


def chained_speedup(parent: float | None, own: float | None) -> float | None:
    """Return the speedup along a chain; None where one of the two is not known."""
    return None if parent is None or own is None else parent * own


FINALISTS = 5
"""Most points that are measured in full."""

Finalist = MeasuredEntry[StepResult]
Chosen = FinalChoice[StepResult]


def pick_finalists(
    points: Sequence[StepResult],
    goal: Goal,
    preference: Preference,
    quantized_originals: Sequence[StepResult],
    most: int = FINALISTS,
) -> list[StepResult]:
    """Return the points to measure in full, by selection samples and single launches.

    Points that meet the targets come first, or are nearest to them. Always among the points: the fastest, the best of
    what quantization alone gave, and the one that loses least. At most `most`, as many as the time left allows, but
    never fewer than the best and those that are always among them.
    """
    speed_of = {id(point): speed for speed, point in zip(comparable_speeds(points), points, strict=True)}
    merits = {id(point): _merit(speed_of[id(point)], point.size_bytes, preference) for point in points}
    within = [point for point in points if point.cautious_drop <= goal.max_quality_drop]
    ranked = sorted(within, key=lambda point: (-point.overshoot(goal), merits[id(point)]), reverse=True)
    chosen = ranked[: max(1, most - 3)]
    fastest = sorted(within, key=lambda point: speed_of[id(point)], reverse=True)
    originals = [point for point in ranked if any(point is other for other in quantized_originals)]
    safest = max(points, key=lambda point: (-point.cautious_drop, merits[id(point)]))
    for further in (*fastest[:1], *originals[:1], safest):
        if not any(further is point for point in chosen):
            chosen.append(further)
    return chosen


@dataclass(frozen=True, slots=True)
class PointRanking(RankingRule[StepResult]):
    """Order of preference of the finalists, by times, sizes and selection samples."""

    loaded: LoadedModel
    goal: Goal
    preference: Preference

    def order(self, timings: PairedTimings[StepResult]) -> list[TimedEntry[StepResult]]:
        """Return the finalists in the order of preference."""
        return sorted(timings.timed, key=lambda one: self.sort_key(one.entry, one.timing, timings))

    def sort_key(self, point: StepResult, timing: Timing, timings: PairedTimings[StepResult]) -> tuple[float, ...]:
        """Return the key of a finalist, smaller for a better one.

        The guard comes first, then the targets, then whether it is slower than quantization alone, which the balanced
        preference would accept for a smaller file, then merit.
        """
        seen = measurement_record(point.artifact, timing, self.loaded.bench, None, None, None)
        missed = self.goal.missed(seen, timings.load)
        furthest = missed[0].factor if missed else 1.0
        within = self._holds(point)
        known = timings.load <= OVERLOADED and timing.speedup is not None
        speedup = timing.speedup.value if known and timing.speedup else point.work_ratio
        slower = (
            known and self.preference.prefer == "balanced" and is_slower(timing, self._quantized_originals(timings))
        )
        merit, size_ratio = _merit(speedup, Manifest.read(point.artifact).size_bytes, self.preference)
        return not within, furthest, slower, -merit if within else point.cautious_drop, -size_ratio

    def missed(self, after: Measurement, _gained: Gains, timings: PairedTimings[StepResult]) -> list[Missed]:
        """Return the targets that a measured finalist does not meet."""
        return self.goal.missed(after, timings.load)

    def _holds(self, point: StepResult) -> bool:
        return point.cautious_drop <= self.goal.max_quality_drop

    def _quantized_originals(self, timings: PairedTimings[StepResult]) -> list[Timing]:
        """Return the timings of quantization alone, within the guard on the selection samples."""
        return [one.timing for one in timings.timed if one.entry.is_quantized_original and self._holds(one.entry)]


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
