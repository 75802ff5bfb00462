"""The end of a search: the best trials against the original in one paired measurement on the evaluation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omgoptim.operations.compression_job import Job
from omgoptim.operations.context import Stage
from omgoptim.operations.final_measurement import (
    SPAN,
    DeliveryRule,
    FinalChoice,
    FinalRace,
    MeasuredEntry,
    TimedEntry,
    measure_finalists,
)
from omgoptim.operations.goal import Goal, Missed
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.report_records import gains, measurement
from omgoptim.reports import Gains, Measurement
from omgoptim.requests import SearchRequest


@dataclass(frozen=True, slots=True)
class TrainedTrial:
    """A trial that was trained to the end."""

    name: str
    number: int
    artifact: Path
    quality: float
    """On the selection samples."""
    by_rule: bool
    """True if the proposal rule chose it, False if the random control did."""


Finalist = MeasuredEntry[TrainedTrial]
Chosen = FinalChoice[TrainedTrial]


def measured(job: Job[SearchRequest], baseline: Path, entries: Sequence[TrainedTrial]) -> Chosen:
    """Time the original and the finalists in turns, read the evaluation data once, and choose.

    The order of preference: networks that meet the targets first, then by quality on the selection samples.

    Raises:
        OmgoptimError: no finalist could be measured.
    """
    loaded = replace(job.loaded, baseline=baseline)
    stage = Stage(job.context, "measuring the finalists against the original", SPAN)
    return measure_finalists(job.request, loaded, entries, TargetsFirst(job.request, loaded), stage)


@dataclass(frozen=True, slots=True)
class TargetsFirst(DeliveryRule[TrainedTrial]):
    """Order of preference: networks that meet the targets, then by quality on the selection samples."""

    request: SearchRequest
    loaded: LoadedModel

    def order(self, race: FinalRace[TrainedTrial]) -> list[TimedEntry[TrainedTrial]]:
        """Return the entries in the order of preference."""
        before = measurement(self.loaded.baseline, race.original, self.loaded.bench, None, None, None)

        def place(one: TimedEntry[TrainedTrial]) -> tuple[float, ...]:
            after = measurement(one.entry.artifact, one.timing, self.loaded.bench, None, None, None)
            over = self.missed(after, gains(before, after, one.timing, None, race.load), race)
            return float(bool(over)), over[0].factor if over else 1.0, -one.entry.quality

        return sorted(race.timed, key=place)

    def missed(self, after: Measurement, gained: Gains, race: FinalRace[TrainedTrial]) -> list[Missed]:
        """Return the targets that are not met, the furthest first."""
        missed = Goal.of(self.request).missed(after, race.load)
        wanted = self.request.target_speedup
        if wanted is not None and gained.speedup is not None and gained.speedup < wanted and after.latency_ms_p50:
            allowed = after.latency_ms_p50 * gained.speedup / wanted
            missed.append(Missed(f"latency for a speedup of {wanted:g}:", after.latency_ms_p50, allowed, "ms"))
        return sorted(missed, key=lambda one: -one.factor)
