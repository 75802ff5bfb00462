"""The final measurement: the original and all finalists in fresh processes, and which of them is delivered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import Quality, StoredOutputs, compare_quality, read_outputs
from omgoptim.measure.timing import Timing
from omgoptim.models.artifact import Manifest
from omgoptim.operations.context import RunContext
from omgoptim.operations.gain_attribution import Side, gains_by
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.coverage import read_kernels
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference, ordered
from omgoptim.operations.timing import OVERLOADED, Raced, full_race, told
from omgoptim.operations.verdict import passes
from omgoptim.reports import GainsBy
from omgoptim.requests import QuantizeRequest
from omgoptim.runtimes.engine import Kernel

Finished = tuple[CandidateResult, Timing, StoredOutputs, list[Kernel]]
"""A finalist, its timing, what it gave on the evaluation data, and what its engine ran."""


@dataclass(frozen=True, slots=True, eq=False)
class Finalist:
    """One candidate measured in full, and its quality on the evaluation data."""

    result: CandidateResult
    timing: Timing
    quality: Quality
    kernels: list[Kernel]
    """What its engine ran, and in which numbers."""
    parts: GainsBy | None
    """What the engine and the bits brought; None where float32 on its engine was not measured."""

    @property
    def slug(self) -> str:
        """The name that `pick` knows it by."""
        return re.sub(r"[^a-z0-9]+", "-", self.result.made.option.name.lower()).strip("-")


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
    loaded: LoadedModel,
    chosen: Sequence[CandidateResult],
    results: Sequence[CandidateResult],
    preference: Preference,
    first: CandidateResult | None = None,
) -> Final:
    """Measure the original and the finalists in full, and find what is delivered.

    The order of delivery follows from times, sizes and the selection samples alone. The first in it that holds the
    guard on the evaluation data is delivered, float32 that nobody asked for after all others; where none does, the
    first.

    Args:
        attempts: all candidates, which a finalist may be dominated by.
        first: what stands before all others in the order: a further search was made for it.
    """
    screened = {id(result): result.speedup for result in chosen}
    raced, finished = _measured(request, context, loaded, chosen)
    known = replace(preference, speed_known=raced.load <= OVERLOADED, load=raced.load)
    order = _order([result for result, *_ in finished], results, request.max_quality_drop, known, first)
    quality = _Judge(request, loaded, _target(context, 0))
    measured = {id(entry[0]): entry for entry in finished}
    whole = []
    for result in order:  # evaluation data is read from here on
        _, timing, given, ran = measured[id(result)]
        parts = _parts(loaded, raced.timing(0), finished, result, raced.load)
        try:
            whole.append(Finalist(result, timing, quality.of(given), ran, parts))
        except OmgoptimError as error:  # infinite outputs, say: the others have theirs
            result.status, result.why, result.error = "failed", f"{error.what}: {error.why}", error
    eligible = [finalist for finalist in whole if not finalist.result.reference]
    if not eligible:
        raise next(result.error for result in order if result.error)
    guard = request.max_quality_drop
    winner = delivered(whole, guard)
    before = screened[id(winner.result)]
    scale = winner.result.speedup / before if before else 1.0
    held = passes(winner.quality, guard)
    passed_over = eligible[: eligible.index(winner)] if held and winner in eligible else eligible
    return Final(raced.timing(0), raced.load, whole, winner, held, passed_over, scale, known)


def delivered(finalists: Sequence[Finalist], guard: float) -> Finalist:
    """Return the first finalist that holds the guard on the evaluation data; where none does, the first of all.

    References come last: float32 on an engine is delivered where nothing that was asked for holds the guard.

    Args:
        finalists: in the order of delivery; one at least is no reference.
    """
    asked = [finalist for finalist in finalists if not finalist.result.reference]
    return next((finalist for finalist in finalists if passes(finalist.quality, guard)), asked[0])


def in_place_words(winner: Finalist, asked: Finalist, guard: float) -> str:
    """Return that float32 on an engine is delivered in the place of what was asked for, and why, in two sentences."""
    quality = asked.quality
    fault = f"loses {quality.drop:.4f}, more than {guard:g}"
    if quality.ruined:
        fault = f"ruins output {', '.join(output.spec.name for output in quality.ruined)}"
    return (
        f"Nothing was quantized: {asked.result.made.option.name} {fault}. Delivered in its place is "
        f"{winner.result.made.option.name}, float32 on that engine, which holds the guard."
    )


def _measured(
    request: QuantizeRequest, context: RunContext, loaded: LoadedModel, chosen: Sequence[CandidateResult]
) -> tuple[Raced, list[Finished]]:
    """The race of the original and the finalists, and those that finished it."""
    targets = [_target(context, index) for index in range(len(chosen) + 1)]
    kernels: list[list[Kernel]] = [[] for _ in targets]

    def outputs(index: int, process: MeasuringProcess) -> None:
        whose = ["the original", *(result.made.option.name for result in chosen)][index]
        process.run_samples(loaded.eval_folder, targets[index], told(context, f"evaluating {whose}"))
        kernels[index] = read_kernels(process) if index else []

    folders = [result.made.folder for result in chosen if result.made.folder]
    doing = f"measuring {', '.join(result.made.option.name for result in chosen)} against the original"
    raced = full_race(
        [loaded.baseline, *folders], loaded.bench, request.timing, request.seed, context, (0.55, 0.95), doing, outputs
    )
    finished: list[Finished] = []
    for result, timing, target, ran in zip(chosen, raced.timings[1:], targets[1:], kernels[1:], strict=True):
        if isinstance(timing, Timing):
            result.timing = timing
            finished.append((result, timing, read_outputs(target), ran))
        else:
            result.status, result.why, result.error = "failed", f"{timing.what}: {timing.why}", timing
    if not any(not result.reference for result, *_ in finished):
        raise next(result.error for result in chosen if result.error)
    return raced, finished


def _target(context: RunContext, index: int) -> Path:
    """Folder for what a contestant gives on the evaluation data; the original is number 0."""
    return context.work / "final" / str(index)


class _Judge:
    """Quality on the evaluation data."""

    def __init__(self, request: QuantizeRequest, loaded: LoadedModel, original: Path) -> None:
        self._original, self._targets, self._seed = read_outputs(original), loaded.evaluation.targets, request.seed
        self._metric = resolve_metric(
            loaded.metric,
            loaded.signature,
            self._original,
            self._targets,
            loaded.policy,
            request.time_limit_s,
            loaded.outputs,
        )

    def of(self, given: StoredOutputs) -> Quality:
        return compare_quality(self._metric, self._original, given, self._targets, self._seed)


def _order(
    finished: Sequence[CandidateResult],
    results: Sequence[CandidateResult],
    guard: float,
    preference: Preference,
    first: CandidateResult | None,
) -> list[CandidateResult]:
    """The finished finalists in the order of delivery; what holds nothing on the selection samples comes after what
    does, references come last."""
    others = [result for result in results if result not in finished]
    held = [a for a in ordered([*finished, *others], guard, preference) if a in finished]
    rest = [result for result in finished if result not in held]
    references = preference.ranked([result for result in rest if result.reference])
    order = [*held, *(a for a in rest if not a.reference), *references]
    return [first, *(a for a in order if a is not first)] if first in order else order


def _parts(
    loaded: LoadedModel,
    before: Timing,
    finished: Sequence[Finished],
    result: CandidateResult,
    load: float,
) -> GainsBy | None:
    """The gain of a finalist split in two, by float32 on its engine."""
    baseline = Manifest.read(loaded.baseline)
    runtime = result.made.option.runtime
    original = Side(before, baseline.size_bytes, "the original")
    plain = original if runtime == baseline.runtime and baseline.precision == "float32" else None
    for other, timing, *_ in finished:
        if other.made.option.scheme == "fp32" and other.made.option.runtime == runtime:
            plain = Side(timing, other.made.size_bytes, other.made.option.name)
    if plain is None or result.timing is None:
        return None
    return gains_by(original, plain, Side(result.timing, result.made.size_bytes, result.made.option.name), load)
