"""Final measurement of artifacts against the original: timed in turns, compared once on the evaluation data.

Every verb that saves an artifact ends with it. The order of preference is the caller's; it is fixed before the
evaluation data is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.quality import Quality, compare_quality, read_outputs
from omgoptim.measure.timing import Timing
from omgoptim.measure.validity_checks import chance_level_summary
from omgoptim.operations.context import RunContext, Stage
from omgoptim.operations.gain_attribution import implausible_sentence
from omgoptim.operations.goal import Missed, time_target
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.reference_outputs import metric_of
from omgoptim.operations.report_records import comparison
from omgoptim.operations.timing import OVERLOADED, fraction_progress, full_race
from omgoptim.operations.verdict import Outcome, holds, outcome_of, passes, ruined_sentence
from omgoptim.reports import Gains, GainsBy, Measurement
from omgoptim.requests import (
    DistillRequest,
    FactorizeRequest,
    OptimizeRequest,
    PruneRequest,
    QuantizeRequest,
    SearchRequest,
)

SPAN = (0.82, 0.97)
"""Fractions of a run of optimize or search between which the final measurement moves its progress."""

Compression = QuantizeRequest | PruneRequest | FactorizeRequest | DistillRequest | OptimizeRequest | SearchRequest
"""Request of a verb that saves an artifact."""


class FinalEntry(Protocol):
    """An artifact that takes part."""

    @property
    def name(self) -> str:
        """Name of the entry in reports."""

    @property
    def artifact(self) -> Path:
        """Folder of its artifact."""


AnyEntry = TypeVar("AnyEntry", bound=FinalEntry)


@dataclass(frozen=True, slots=True)
class NamedArtifact:
    """An artifact with its name in reports."""

    name: str
    artifact: Path


@dataclass(frozen=True, slots=True)
class TimedEntry(Generic[AnyEntry]):
    """An entry that was timed, and its outputs on the evaluation data, which are not compared yet."""

    entry: AnyEntry
    timing: Timing
    outputs: Path


@dataclass(frozen=True, slots=True)
class FinalRace(Generic[AnyEntry]):
    """The original and the entries, timed in turns."""

    original: Timing
    original_outputs: Path
    load: float
    timed: list[TimedEntry[AnyEntry]]
    failed: list[tuple[AnyEntry, OmgoptimError]]
    """Entries without a timing, or whose outputs cannot be compared, in the order in which they failed."""


class DeliveryRule(Generic[AnyEntry]):
    """Order of preference of the entries, and the targets that they must meet; default: as given, without targets."""

    def ran(self, entry: AnyEntry, process: MeasuringProcess) -> None:
        """Query the first measuring process of an entry for more than times and outputs."""

    def order(self, race: FinalRace[AnyEntry]) -> list[TimedEntry[AnyEntry]]:
        """Return the timed entries in the order of preference, from times and selection samples alone."""
        return race.timed

    def missed(self, _after: Measurement, _gained: Gains, _race: FinalRace[AnyEntry]) -> list[Missed]:
        """Return the targets that a measured entry does not meet."""
        return []


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredEntry(Generic[AnyEntry]):
    """An entry measured in full, with its quality on the evaluation data."""

    entry: AnyEntry
    timing: Timing
    quality: Quality
    before: Measurement
    after: Measurement
    gains: Gains
    outputs: Path
    """Folder of its outputs on the evaluation data."""
    missed: list[Missed]
    """Targets that it does not meet."""

    @property
    def slug(self) -> str:
        """The name that `pick` takes."""
        return re.sub(r"[^a-z0-9]+", "-", self.entry.name.lower()).strip("-")[:80]


MeasuredArtifact = MeasuredEntry[NamedArtifact]


@dataclass(frozen=True, slots=True)
class FinalChoice(Generic[AnyEntry]):
    """All measured entries in the order of preference, and the chosen one."""

    request: Compression
    context: RunContext
    loaded: LoadedModel
    """The original."""
    race: FinalRace[AnyEntry]
    finalists: list[MeasuredEntry[AnyEntry]]

    @property
    def guard(self) -> float:
        """Largest quality drop that is allowed."""
        return self.request.max_quality_drop

    @property
    def holds(self) -> bool:
        """True if the winner passes the quality guard on the evaluation data and meets every target."""
        return passes(self.winner.quality, self.guard) and not self.winner.missed

    @property
    def winner(self) -> MeasuredEntry[AnyEntry]:
        """The first that passes the guard and meets every target; else the first that passes it; else the first."""
        passing = [one for one in self.finalists if passes(one.quality, self.guard)]
        return ([one for one in passing if not one.missed] or passing or self.finalists)[0]

    def outcome(self, one: MeasuredEntry[AnyEntry]) -> Outcome:
        """Return the outcome of a run that delivers this entry."""
        return "guard_failed" if one.missed else outcome_of(one.gains, one.quality, self.guard)

    def place(self, one: MeasuredEntry[AnyEntry]) -> Path:
        """Return the folder of an entry's artifact in the run."""
        return self.context.artifact if one is self.winner else self.context.alternatives / one.slug

    def implausible(self, one: MeasuredEntry[AnyEntry], parts: GainsBy | None = None) -> str:
        """Return the sentence on an implausible speedup; `parts` are its gains by engine and precision."""
        race, device = self.race, self.loaded.device
        return implausible_sentence(parts, race.original, one.after.runtime, device, race.load, one.timing)

    def chance_level(self, one: MeasuredEntry[AnyEntry]) -> str:
        """Return the sentence on an original at chance level; empty where it is above."""
        return chance_level_summary(one.before.metric, one.before.quality, self.loaded.evaluation.targets)

    def leading_warnings(self, one: MeasuredEntry[AnyEntry], parts: GainsBy | None = None) -> list[str]:
        """Return sentences that precede the ratios: chance level, an implausible speedup, an undecided time target."""
        implausible = self.implausible(one, parts)
        return [text for text in (self.chance_level(one), implausible and f"{implausible}.", self._undecided()) if text]

    def _undecided(self) -> str:
        target = time_target(self.request) if self.race.load > OVERLOADED else None
        return f"Whether {target} is reached is undecided: the machine was overloaded." if target else ""


def measure_finalists(
    request: Compression,
    loaded: LoadedModel,
    entries: Sequence[AnyEntry],
    rule: DeliveryRule[AnyEntry],
    stage: Stage,
    limit_s: float = math.inf,
) -> FinalChoice[AnyEntry]:
    """Time the original and the entries in turns, read the evaluation data once, and choose.

    Args:
        request: with the guard, the timing and the seed.
        loaded: the original with its data and its artifact.
        entries: artifacts to measure, each with a name.
        rule: order of preference and targets.
        stage: part of the run that this is.
        limit_s: seconds within which the launches after the second must end.

    Raises:
        OmgoptimError: no entry could be measured.
    """
    context = stage.context
    targets = [context.work / "final" / str(index) for index in range(len(entries) + 1)]

    def outputs(index: int, process: MeasuringProcess) -> None:
        whose = ["the original", *(entry.name for entry in entries)][index]
        process.run_samples(loaded.eval_folder, targets[index], fraction_progress(context, f"evaluating {whose}"))
        if index:
            rule.ran(entries[index - 1], process)

    folders = [loaded.baseline, *(entry.artifact for entry in entries)]
    raced = full_race(folders, loaded.bench, request, stage, outputs, limit_s)
    race: FinalRace[AnyEntry] = FinalRace(raced.timing(0), targets[0], raced.load, [], [])
    for entry, timing, target in zip(entries, raced.timings[1:], targets[1:], strict=True):
        if isinstance(timing, Timing):
            race.timed.append(TimedEntry(entry, timing, target))
        else:
            race.failed.append((entry, timing))
    chosen = FinalChoice(request, context, loaded, race, _compared(request, loaded, race, rule))
    if not chosen.finalists:
        raise next((error for _, error in race.failed), TechniqueError("no artifact could be measured"))
    return chosen


def _compared(
    request: Compression, loaded: LoadedModel, race: FinalRace[AnyEntry], rule: DeliveryRule[AnyEntry]
) -> list[MeasuredEntry[AnyEntry]]:
    """Compare the outputs on the evaluation data; an entry whose outputs cannot be compared has failed."""
    order, evaluation = rule.order(race), loaded.evaluation
    original = read_outputs(race.original_outputs)
    metric = metric_of(loaded, original, evaluation.targets, request.time_limit_s)
    measured = []
    for one in order:  # evaluation data is read from here on
        try:
            quality = compare_quality(metric, original, read_outputs(one.outputs), evaluation.targets, request.seed)
        except OmgoptimError as error:  # infinite outputs, say: the other entries are unaffected
            race.failed.append((one.entry, error))
            continue
        folders, timings = (loaded.baseline, one.entry.artifact), (race.original, one.timing)
        before, after, gained = comparison(folders, timings, loaded.bench, quality, evaluation.count, race.load)
        missed = rule.missed(after, gained, race)
        measured.append(MeasuredEntry(one.entry, one.timing, quality, before, after, gained, one.outputs, missed))
    return measured


def guard_reasons(one: MeasuredEntry[AnyEntry], guard: float) -> list[str]:
    """Return why an entry misses the goal: a ruined output, its quality drop, each target that it misses."""
    reasons = [ruined_sentence(one.quality.ruined).rstrip(".")] if one.quality.ruined else []
    if not holds(one.quality.drop, guard):
        reasons.append(f"quality drop {one.quality.drop:.4f}, above the guard {guard:g}")
    return [*reasons, *(str(missed) for missed in one.missed)]
