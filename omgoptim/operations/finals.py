"""The final measurement: the original and all finalists in fresh processes, and which of them is delivered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.launch import Process
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import Quality, StoredOutputs, compare_quality, read_outputs
from omgoptim.measure.race import Timing
from omgoptim.models.artifact import Manifest
from omgoptim.operations.attribution import Side, gains_by
from omgoptim.operations.choosing import Preference, ordered
from omgoptim.operations.context import RunContext
from omgoptim.operations.coverage_proof import told_kernels
from omgoptim.operations.screening import Attempt
from omgoptim.operations.subject import Subject
from omgoptim.operations.timing import OVERLOADED, Raced, full_race, told
from omgoptim.operations.verdict import passes
from omgoptim.reports import GainsBy
from omgoptim.requests import QuantizeRequest
from omgoptim.runtimes.engine import Kernel

Finished = tuple[Attempt, Timing, StoredOutputs, list[Kernel]]
"""A finalist, its timing, what it gave on the evaluation data, and what its engine ran."""


@dataclass(frozen=True, slots=True, eq=False)
class Finalist:
    """One candidate measured in full, and its quality on the evaluation data."""

    attempt: Attempt
    timing: Timing
    quality: Quality
    kernels: list[Kernel]
    """What its engine ran, and in which numbers."""
    parts: GainsBy | None
    """What the engine and the bits brought; None where float32 on its engine was not measured."""

    @property
    def slug(self) -> str:
        """The name that `pick` knows it by."""
        return re.sub(r"[^a-z0-9]+", "-", self.attempt.made.option.name.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Final:
    """The end of the race."""

    before: Timing
    load: float
    finalists: list[Finalist]
    """In the order of delivery, which was fixed before the evaluation data was read; references come last."""
    winner: Finalist
    holds: bool
    """Whether the winner holds the guard on the evaluation data."""
    passed_over: list[Finalist]
    """Those before the winner in the order, which failed the guard on the evaluation data."""
    scale: float
    """The winner's speedup measured in full over that of its screening, where the original may have been slow."""
    preference: Preference


def final_race(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    chosen: Sequence[Attempt],
    attempts: Sequence[Attempt],
    preference: Preference,
    first: Attempt | None = None,
) -> Final:
    """Measure the original and the finalists in full, and find what is delivered.

    The order of delivery follows from times, sizes and the selection samples alone. The first in it that holds the
    guard on the evaluation data is delivered, float32 that nobody asked for after all others; where none does, the
    first.

    Args:
        attempts: all candidates, which a finalist may be dominated by.
        first: what stands before all others in the order: a further search was made for it.
    """
    screened = {id(attempt): attempt.speedup for attempt in chosen}
    raced, finished = _measured(request, context, subject, chosen)
    known = replace(preference, speed_known=raced.load <= OVERLOADED, load=raced.load)
    order = _order([attempt for attempt, *_ in finished], attempts, request.max_quality_drop, known, first)
    quality = _Judge(request, subject, _target(context, 0))
    measured = {id(entry[0]): entry for entry in finished}
    whole = []
    for attempt in order:  # evaluation data is read from here on
        _, timing, given, ran = measured[id(attempt)]
        parts = _parts(subject, raced.timing(0), finished, attempt, raced.load)
        try:
            whole.append(Finalist(attempt, timing, quality.of(given), ran, parts))
        except OmgoptimError as error:  # infinite outputs, say: the others have theirs
            attempt.status, attempt.why, attempt.error = "failed", f"{error.what}: {error.why}", error
    eligible = [finalist for finalist in whole if not finalist.attempt.reference]
    if not eligible:
        raise next(attempt.error for attempt in order if attempt.error)
    guard = request.max_quality_drop
    winner = delivered(whole, guard)
    before = screened[id(winner.attempt)]
    scale = winner.attempt.speedup / before if before else 1.0
    held = passes(winner.quality, guard)
    passed_over = eligible[: eligible.index(winner)] if held and winner in eligible else eligible
    return Final(raced.timing(0), raced.load, whole, winner, held, passed_over, scale, known)


def delivered(finalists: Sequence[Finalist], guard: float) -> Finalist:
    """Return the first finalist that holds the guard on the evaluation data; where none does, the first of all.

    References come last: float32 on an engine is delivered where nothing that was asked for holds the guard.

    Args:
        finalists: in the order of delivery; one at least is no reference.
    """
    asked = [finalist for finalist in finalists if not finalist.attempt.reference]
    return next((finalist for finalist in finalists if passes(finalist.quality, guard)), asked[0])


def in_place_words(winner: Finalist, asked: Finalist, guard: float) -> str:
    """Return that float32 on an engine is delivered in the place of what was asked for, and why, in two sentences."""
    quality = asked.quality
    fault = f"loses {quality.drop:.4f}, more than {guard:g}"
    if quality.ruined:
        fault = f"ruins output {', '.join(output.spec.name for output in quality.ruined)}"
    return (
        f"Nothing was quantized: {asked.attempt.made.option.name} {fault}. Delivered in its place is "
        f"{winner.attempt.made.option.name}, float32 on that engine, which holds the guard."
    )


def _measured(
    request: QuantizeRequest, context: RunContext, subject: Subject, chosen: Sequence[Attempt]
) -> tuple[Raced, list[Finished]]:
    """The race of the original and the finalists, and those that finished it."""
    targets = [_target(context, index) for index in range(len(chosen) + 1)]
    kernels: list[list[Kernel]] = [[] for _ in targets]

    def outputs(index: int, process: Process) -> None:
        whose = ["the original", *(attempt.made.option.name for attempt in chosen)][index]
        process.run_samples(subject.eval_folder, targets[index], told(context, f"evaluating {whose}"))
        kernels[index] = told_kernels(process) if index else []

    folders = [attempt.made.folder for attempt in chosen if attempt.made.folder]
    doing = f"measuring {', '.join(attempt.made.option.name for attempt in chosen)} against the original"
    raced = full_race(
        [subject.baseline, *folders], subject.bench, request.timing, request.seed, context, (0.55, 0.95), doing, outputs
    )
    finished: list[Finished] = []
    for attempt, timing, target, ran in zip(chosen, raced.timings[1:], targets[1:], kernels[1:], strict=True):
        if isinstance(timing, Timing):
            attempt.timing = timing
            finished.append((attempt, timing, read_outputs(target), ran))
        else:
            attempt.status, attempt.why, attempt.error = "failed", f"{timing.what}: {timing.why}", timing
    if not any(not attempt.reference for attempt, *_ in finished):
        raise next(attempt.error for attempt in chosen if attempt.error)
    return raced, finished


def _target(context: RunContext, index: int) -> Path:
    """Folder for what a contestant gives on the evaluation data; the original is number 0."""
    return context.work / "final" / str(index)


class _Judge:
    """Quality on the evaluation data."""

    def __init__(self, request: QuantizeRequest, subject: Subject, original: Path) -> None:
        self._original, self._targets, self._seed = read_outputs(original), subject.evaluation.targets, request.seed
        self._metric = resolve_metric(
            subject.metric,
            subject.signature,
            self._original,
            self._targets,
            subject.reach,
            request.time_limit_s,
            subject.outputs,
        )

    def of(self, given: StoredOutputs) -> Quality:
        return compare_quality(self._metric, self._original, given, self._targets, self._seed)


def _order(
    finished: Sequence[Attempt],
    attempts: Sequence[Attempt],
    guard: float,
    preference: Preference,
    first: Attempt | None,
) -> list[Attempt]:
    """The finished finalists in the order of delivery; what holds nothing on the selection samples comes after what
    does, references come last."""
    others = [attempt for attempt in attempts if attempt not in finished]
    held = [a for a in ordered([*finished, *others], guard, preference) if a in finished]
    rest = [attempt for attempt in finished if attempt not in held]
    references = preference.ranked([attempt for attempt in rest if attempt.reference])
    order = [*held, *(a for a in rest if not a.reference), *references]
    return [first, *(a for a in order if a is not first)] if first in order else order


def _parts(
    subject: Subject,
    before: Timing,
    finished: Sequence[Finished],
    attempt: Attempt,
    load: float,
) -> GainsBy | None:
    """The gain of a finalist split in two, by float32 on its engine."""
    baseline = Manifest.read(subject.baseline)
    runtime = attempt.made.option.runtime
    original = Side(before, baseline.size_bytes, "the original")
    plain = original if runtime == baseline.runtime and baseline.precision == "float32" else None
    for other, timing, *_ in finished:
        if other.made.option.scheme == "fp32" and other.made.option.runtime == runtime:
            plain = Side(timing, other.made.size_bytes, other.made.option.name)
    if plain is None or attempt.timing is None:
        return None
    return gains_by(original, plain, Side(attempt.timing, attempt.made.size_bytes, attempt.made.option.name), load)
