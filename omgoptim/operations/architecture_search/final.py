"""The end of a search: the best trials against the original in one paired measurement on the evaluation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omgoptim.measure.timing import Timing
from omgoptim.operations.compression_job import Job
from omgoptim.operations.final_measurement import FinalChoice, MeasuredEntry, Place, measure_entries
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.goal import Goal, Missed
from omgoptim.operations.report_records import gains, measurement
from omgoptim.operations.timing import OVERLOADED, RaceResult
from omgoptim.reports import Gains, Measurement
from omgoptim.requests import SearchRequest


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


Finalist = MeasuredEntry[Entry]
Chosen = FinalChoice[Entry]


def measure_finalists(job: Job[SearchRequest], baseline: Path, entries: Sequence[Entry]) -> Chosen:
    """Time the original and the finalists in turns, read the evaluation data once, and choose.

    The order of preference: networks that meet the targets first, then by quality on the selection samples.

    Raises:
        OmgoptimError: no finalist could be measured.
    """
    loaded = replace(job.loaded, baseline=baseline)
    return measure_entries(job.request, job.context, loaded, entries, TargetsFirst(job.request, loaded))


@dataclass(frozen=True, slots=True)
class TargetsFirst:
    """Order of preference: networks that meet the targets, then by quality on the selection samples."""

    request: SearchRequest
    loaded: LoadedModel

    def place(self, entry: Entry, timing: Timing, raced: RaceResult) -> Place:
        """Return the key of an entry in the order."""
        before = measurement(self.loaded.baseline, raced.timing(0), self.loaded.bench, None, None, None)
        after = measurement(entry.artifact, timing, self.loaded.bench, None, None, None)
        over = self.missed(after, gains(before, after, timing, None, raced.load), raced)
        return float(bool(over)), over[0].factor if over else 1.0, -entry.quality

    def missed(self, after: Measurement, gained: Gains, raced: RaceResult) -> list[Missed]:
        """Return the targets that a measured entry does not meet."""
        return _missed(self.request, after, gained, raced.load)


def _missed(request: SearchRequest, after: Measurement, gained: Gains, load: float) -> list[Missed]:
    """Return the targets that are not met; a time of an overloaded machine is not a miss."""
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
