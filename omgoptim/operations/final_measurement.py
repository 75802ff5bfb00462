"""Final measurement of several artifacts against the original: timed in turns, judged once on the evaluation data.

`optimize` and `search` end with it. The order of preference is the caller's; it is fixed before the evaluation data is
read.
"""

from __future__ import annotations

import math
import os
import re
import shutil
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
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.goal import Missed
from omgoptim.operations.reference_outputs import metric_of
from omgoptim.operations.report_records import gains, measurement
from omgoptim.operations.timing import RaceResult, fraction_progress, full_race
from omgoptim.operations.verdict import holds, passes, ruined_sentence
from omgoptim.reports import Gains, GainsBy, Measurement
from omgoptim.requests import OptimizeRequest, SearchRequest

SPAN = (0.82, 0.97)
"""Fractions of the run between which the final measurement moves its progress."""


class Entry(Protocol):
    """An artifact that takes part."""

    @property
    def name(self) -> str:
        """Name of the entry in reports."""

    @property
    def artifact(self) -> Path:
        """Folder of its artifact."""


AnyEntry = TypeVar("AnyEntry", bound=Entry)
RuledEntry = TypeVar("RuledEntry", bound=Entry, contravariant=True)
Place = tuple[float, ...]
"""Key of the order of preference: smaller is better."""


class DeliveryRule(Protocol[RuledEntry]):
    """Order of preference of the entries, and the targets that they must meet."""

    def place(self, entry: RuledEntry, timing: Timing, raced: RaceResult, /) -> Place:
        """Return the key of an entry in the order, from times and selection samples alone."""

    def missed(self, after: Measurement, gained: Gains, raced: RaceResult, /) -> list[Missed]:
        """Return the targets that a measured entry does not meet."""


@dataclass(frozen=True, slots=True)
class MeasuredEntry(Generic[AnyEntry]):
    """An entry measured in full, with its quality on the evaluation data."""

    entry: AnyEntry
    timing: Timing
    quality: Quality
    before: Measurement
    after: Measurement
    gains: Gains
    missed: list[Missed]
    """Targets that it does not meet."""

    @property
    def slug(self) -> str:
        """The name that `pick` takes."""
        return re.sub(r"[^a-z0-9]+", "-", self.entry.name.lower()).strip("-")[:80]


@dataclass(frozen=True, slots=True)
class FinalChoice(Generic[AnyEntry]):
    """All measured entries in the order of preference, and the chosen one."""

    finalists: list[MeasuredEntry[AnyEntry]]
    winner: MeasuredEntry[AnyEntry]
    holds: bool
    """True if the winner passes the quality guard on the evaluation data and meets every target."""
    original: Timing
    load: float


def measure_entries(
    request: OptimizeRequest | SearchRequest,
    context: RunContext,
    loaded: LoadedModel,
    entries: Sequence[AnyEntry],
    rule: DeliveryRule[AnyEntry],
    limit_s: float = math.inf,
) -> FinalChoice[AnyEntry]:
    """Time the original and the entries in turns, read the evaluation data once, and choose.

    The first entry in the order that passes the guard and meets every target is chosen; else the first that passes the
    guard; else the first.

    Args:
        request: with the guard, the timing and the seed.
        context: of the run.
        loaded: the original with its data and its artifact.
        entries: artifacts to measure, each with a name.
        rule: order of preference and targets.
        limit_s: seconds within which the launches after the second must end.

    Raises:
        OmgoptimError: no entry could be measured.
    """
    targets = [context.work / "final" / str(index) for index in range(len(entries) + 1)]

    def outputs(index: int, process: MeasuringProcess) -> None:
        whose = ["the original", *(entry.name for entry in entries)][index]
        process.run_samples(loaded.eval_folder, targets[index], fraction_progress(context, f"evaluating {whose}"))

    folders = [loaded.baseline, *(entry.artifact for entry in entries)]
    stage = Stage(context, "measuring the finalists against the original", SPAN)
    raced = full_race(folders, loaded.bench, request, stage, outputs, limit_s)
    timed = []
    failure: OmgoptimError | None = None
    for entry, timing, target in zip(entries, raced.timings[1:], targets[1:], strict=True):
        if isinstance(timing, Timing):
            timed.append((entry, timing, target))
        else:
            failure = timing
    timed.sort(key=lambda one: rule.place(one[0], one[1], raced))
    original = read_outputs(targets[0])
    metric = metric_of(loaded, original, loaded.evaluation.targets, request.time_limit_s)
    finalists: list[MeasuredEntry[AnyEntry]] = []
    for entry, timing, target in timed:  # evaluation data is read from here on
        try:
            quality = compare_quality(metric, original, read_outputs(target), loaded.evaluation.targets, request.seed)
        except OmgoptimError as error:  # infinite outputs, say
            failure = error
            continue
        finalists.append(_measured(entry, timing, quality, loaded, raced, rule))
    if not finalists:
        raise failure or TechniqueError("no artifact could be measured")
    guard = request.max_quality_drop
    passing = [one for one in finalists if passes(one.quality, guard)]
    reaching = [one for one in passing if not one.missed]
    return FinalChoice(finalists, (reaching or passing or finalists)[0], bool(reaching), raced.timing(0), raced.load)


def doubts(
    one: MeasuredEntry[AnyEntry], chosen: FinalChoice[AnyEntry], loaded: LoadedModel, parts: GainsBy | None = None
) -> list[str]:
    """Return the sentences that come before any ratio: an original at chance level, an implausible speedup."""
    chance = chance_level_summary(one.before.metric, one.before.quality, loaded.evaluation.targets)
    implausible = implausible_speedup(one, chosen, loaded, parts)
    return [text for text in (chance, implausible and f"{implausible}.") if text]


def implausible_speedup(
    one: MeasuredEntry[AnyEntry], chosen: FinalChoice[AnyEntry], loaded: LoadedModel, parts: GainsBy | None
) -> str:
    """Return the sentence on an implausible speedup; `parts` are the gains that its quantization measured."""
    runtime = one.after.runtime
    return implausible_sentence(parts, chosen.original, runtime, loaded.device, chosen.load, one.timing)


def guard_reasons(one: MeasuredEntry[AnyEntry], guard: float) -> list[str]:
    """Return why an entry misses the goal: a ruined output, its quality drop, each target that it misses."""
    reasons = [ruined_sentence(one.quality.ruined).rstrip(".")] if one.quality.ruined else []
    if not holds(one.quality.drop, guard):
        reasons.append(f"a drop of {one.quality.drop:.4f}, guard {guard:g}")
    return [*reasons, *(str(missed) for missed in one.missed)]


def save_choice(chosen: FinalChoice[AnyEntry], context: RunContext) -> dict[str, Path]:
    """Copy the winner's artifact and those of the other finalists into the run's folder, each whole; place by slug."""
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


def _measured(
    entry: AnyEntry,
    timing: Timing,
    quality: Quality,
    loaded: LoadedModel,
    raced: RaceResult,
    rule: DeliveryRule[AnyEntry],
) -> MeasuredEntry[AnyEntry]:
    count = loaded.evaluation.count
    before = measurement(loaded.baseline, raced.timing(0), loaded.bench, quality.before, quality.metric, count)
    after = measurement(entry.artifact, timing, loaded.bench, quality.after, quality.metric, count)
    gained = gains(before, after, timing, quality, raced.load)
    return MeasuredEntry(entry, timing, quality, before, after, gained, rule.missed(after, gained, raced))
