"""Final measurement: race the original and all finalists in fresh processes and choose the artifact."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.quality import Quality, StoredOutputs, compare_quality, read_outputs
from omgoptim.measure.timing import Timing
from omgoptim.models.manifest import Manifest
from omgoptim.operations.context import RunContext, Stage
from omgoptim.operations.gain_attribution import TimedModel, gains_by
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.coverage import read_kernels
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference, ordered
from omgoptim.operations.reference_outputs import metric_of
from omgoptim.operations.timing import OVERLOADED, RaceResult, fraction_progress, full_race
from omgoptim.operations.verdict import passes
from omgoptim.reports import GainsBy
from omgoptim.requests import QuantizeRequest
from omgoptim.runtimes.engine import Kernel

Finished = tuple[CandidateResult, Timing, StoredOutputs, list[Kernel]]
"""A finalist, its timing, its outputs on the evaluation data, and the kernels of its engine."""


@dataclass(frozen=True, slots=True, eq=False)
class FinalistResult:
    """Full measurement of one finalist."""

    result: CandidateResult
    timing: Timing
    quality: Quality
    kernels: list[Kernel]
    """Kernels that its engine ran, with their compute precision."""
    parts: GainsBy | None
    """Gains by engine and by precision; None where float32 on its engine was not measured."""

    @property
    def slug(self) -> str:
        """Name of this finalist for `pick`."""
        return re.sub(r"[^a-z0-9]+", "-", self.result.built.spec.name.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class FinalRace:
    """Result of the final measurement."""

    before: Timing
    load: float
    finalists: list[FinalistResult]
    """In order of preference, fixed before the evaluation data was read; references come last."""
    winner: FinalistResult
    holds: bool
    """True if the winner passes the quality guard on the evaluation data."""
    rejected: list[FinalistResult]
    """Preferred finalists that failed the quality guard on the evaluation data."""
    scale: float
    """Ratio of the winner's final speedup to that of its screening."""
    preference: Preference


def final_race(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    chosen: Sequence[CandidateResult],
    results: Sequence[CandidateResult],
    first: CandidateResult | None = None,
) -> FinalRace:
    """Measure the original and the finalists in full and choose the artifact.

    The order of preference follows from times, sizes and the selection samples alone. The first finalist in it that
    passes the guard on the evaluation data is chosen, float32 that was not asked for after all others; where none
    does, the first.

    Args:
        request: with the guard, the timing and the seed.
        context: of the run.
        loaded: the original with its data.
        chosen: the finalists.
        results: all candidates, any of which may dominate a finalist.
        first: the finalist to prefer over all others: the result of a further search.
    """
    screened = {id(result): result.speedup for result in chosen}
    raced, finished = _measure_finalists(request, context, loaded, chosen)
    known = replace(Preference.of(request, loaded), speed_known=raced.load <= OVERLOADED, load=raced.load)
    order = _delivery_order([result for result, *_ in finished], results, request.max_quality_drop, known, first)
    quality = _FinalEvaluator(request, loaded, _target(context, 0))
    measured = {id(entry[0]): entry for entry in finished}
    whole = []
    for result in order:  # evaluation data is read from here on
        _, timing, given, ran = measured[id(result)]
        parts = _gain_split(loaded, raced.timing(0), finished, result, raced.load)
        try:
            whole.append(FinalistResult(result, timing, quality.of(given), ran, parts))
        except OmgoptimError as error:  # infinite outputs, for example: the other finalists are unaffected
            result.status, result.why, result.error = "failed", f"{error.what}: {error.why}", error
    eligible = [finalist for finalist in whole if not finalist.result.reference]
    if not eligible:
        raise next(result.error for result in order if result.error)
    guard = request.max_quality_drop
    winner = chosen_finalist(whole, guard)
    before = screened[id(winner.result)]
    scale = winner.result.speedup / before if before else 1.0
    held = passes(winner.quality, guard)
    rejected = eligible[: eligible.index(winner)] if held and winner in eligible else eligible
    return FinalRace(raced.timing(0), raced.load, whole, winner, held, rejected, scale, known)


def chosen_finalist(finalists: Sequence[FinalistResult], guard: float) -> FinalistResult:
    """Return the first finalist that passes the guard on the evaluation data; where none does, the first.

    References come last: float32 on an engine is chosen where nothing that was asked for passes the guard.

    Args:
        finalists: in the order of preference; at least one is not a reference.
        guard: the largest quality drop that is allowed.
    """
    asked = [finalist for finalist in finalists if not finalist.result.reference]
    return next((finalist for finalist in finalists if passes(finalist.quality, guard)), asked[0])


def replacement_sentence(winner: FinalistResult, asked: FinalistResult, guard: float) -> str:
    """Return sentences on float32 chosen because the requested scheme fails the guard."""
    quality = asked.quality
    fault = f"loses {quality.drop:.4f}, more than {guard:g}"
    if quality.ruined:
        fault = f"ruins output {', '.join(output.spec.name for output in quality.ruined)}"
    return (
        f"Nothing was quantized: {asked.result.built.spec.name} {fault}. Chosen instead: "
        f"{winner.result.built.spec.name}, float32 on that engine, which passes the guard."
    )


def _measure_finalists(
    request: QuantizeRequest, context: RunContext, loaded: LoadedModel, chosen: Sequence[CandidateResult]
) -> tuple[RaceResult, list[Finished]]:
    """Race the original and the finalists, and return those that finished."""
    targets = [_target(context, index) for index in range(len(chosen) + 1)]
    kernels: list[list[Kernel]] = [[] for _ in targets]

    def outputs(index: int, process: MeasuringProcess) -> None:
        whose = ["the original", *(result.built.spec.name for result in chosen)][index]
        process.run_samples(loaded.eval_folder, targets[index], fraction_progress(context, f"evaluating {whose}"))
        kernels[index] = read_kernels(process) if index else []

    folders = [result.built.folder for result in chosen if result.built.folder]
    doing = f"measuring {', '.join(result.built.spec.name for result in chosen)} against the original"
    stage = Stage(context, doing, (0.55, 0.95))
    raced = full_race([loaded.baseline, *folders], loaded.bench, request, stage, outputs)
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
    """Return the folder for outputs on the evaluation data; the original is number 0."""
    return context.work / "final" / str(index)


class _FinalEvaluator:
    """Evaluator on the evaluation data."""

    def __init__(self, request: QuantizeRequest, loaded: LoadedModel, original: Path) -> None:
        self._original, self._targets, self._seed = read_outputs(original), loaded.evaluation.targets, request.seed
        self._metric = metric_of(loaded, self._original, self._targets, request.time_limit_s)

    def of(self, given: StoredOutputs) -> Quality:
        return compare_quality(self._metric, self._original, given, self._targets, self._seed)


def _delivery_order(
    finished: Sequence[CandidateResult],
    results: Sequence[CandidateResult],
    guard: float,
    preference: Preference,
    first: CandidateResult | None,
) -> list[CandidateResult]:
    """Order the finished finalists: those that pass the guard on the selection samples, the others, references."""
    others = [result for result in results if result not in finished]
    held = [a for a in ordered([*finished, *others], guard, preference) if a in finished]
    rest = [result for result in finished if result not in held]
    references = preference.ranked([result for result in rest if result.reference])
    order = [*held, *(a for a in rest if not a.reference), *references]
    return [first, *(a for a in order if a is not first)] if first in order else order


def _gain_split(
    loaded: LoadedModel,
    before: Timing,
    finished: Sequence[Finished],
    result: CandidateResult,
    load: float,
) -> GainsBy | None:
    """Split the gain of a finalist by engine and precision, using float32 on its engine."""
    baseline = Manifest.read(loaded.baseline)
    runtime = result.built.spec.runtime
    original = TimedModel(before, baseline.size_bytes, "the original")
    plain = original if runtime == baseline.runtime and baseline.precision == "float32" else None
    for other, timing, *_ in finished:
        if other.built.spec.scheme == "fp32" and other.built.spec.runtime == runtime:
            plain = TimedModel(timing, other.built.size_bytes, other.built.spec.name)
    if plain is None or result.timing is None:
        return None
    return gains_by(original, plain, TimedModel(result.timing, result.built.size_bytes, result.built.spec.name), load)
