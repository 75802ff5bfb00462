"""Final measurement of the finalists of a quantize run, and a second mixed precision search where the result fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.quality import read_outputs
from omgoptim.models.manifest import Manifest
from omgoptim.models.samples import Samples
from omgoptim.operations.context import RunContext, Stage
from omgoptim.operations.final_measurement import (
    FinalChoice,
    MeasuredEntry,
    PairedTimings,
    RankingRule,
    TimedEntry,
    measure_finalists,
)
from omgoptim.operations.gain_attribution import TimedModel, gains_by
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidate_evaluator import CALIBRATED, Evaluators
from omgoptim.operations.quantization.coverage import read_kernels
from omgoptim.operations.quantization.mixed_precision import (
    MixedPrecision,
    MixedPrecisionSearch,
    mixed_precision_base,
    search_mixed_precision,
)
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, passes_guard_with_margin
from omgoptim.operations.quantization.selection import (
    Preference,
    dominated_by,
    order_candidates,
    select_finalists,
)
from omgoptim.operations.quantization.splits import Splits, unused_samples
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import GainsBy
from omgoptim.requests import QuantizeRequest

Finalist = MeasuredEntry[CandidateResult]


@dataclass(frozen=True, slots=True)
class CandidateChoice:
    """The measured finalists, with what the order of preference followed from."""

    measured: FinalChoice[CandidateResult]
    """In order of preference; float32 references come last."""
    preference: Preference
    scale: float
    """Ratio of the winner's final speedup to that of its screening."""

    @property
    def rejected(self) -> list[Finalist]:
        """Preferred finalists that failed the quality guard on the evaluation data."""
        winner = self.measured.winner
        requested = [finalist for finalist in self.measured.finalists if not finalist.entry.reference]
        return requested[: requested.index(winner)] if self.measured.holds and winner in requested else requested


@dataclass(frozen=True, slots=True)
class CandidateRanking(RankingRule[CandidateResult]):
    """Order of preference of candidates: those that pass the guard on the selection samples, others, references."""

    results: Sequence[CandidateResult]
    """All candidates, any of which may dominate a finalist."""
    guard: float
    preference: Preference
    """Of the request, for an idle machine."""
    first: CandidateResult | None = None
    """The finalist to prefer over all others: the result of a further search."""

    def on_first_run(self, result: CandidateResult, process: MeasuringProcess) -> None:
        """Read the kernels of the engine."""
        result.kernels = read_kernels(process)

    def order(self, timings: PairedTimings[CandidateResult]) -> list[TimedEntry[CandidateResult]]:
        """Return the finalists in the order of preference; the timing of each becomes that of its candidate."""
        record_failures(timings)
        timed = {id(one.entry): one for one in timings.timed}
        for one in timings.timed:
            one.entry.timing = one.timing
        finished = [one.entry for one in timings.timed]
        others = [result for result in self.results if result not in finished]
        preference = self.under_load(timings.load)
        held = [a for a in order_candidates([*finished, *others], self.guard, preference) if a in finished]
        rest = [result for result in finished if result not in held]
        references = preference.ranked([result for result in rest if result.reference])
        order = [*held, *(a for a in rest if not a.reference), *references]
        if self.first is not None and self.first in order:
            order = [self.first, *(a for a in order if a is not self.first)]
        return [timed[id(result)] for result in order]

    def under_load(self, load: float) -> Preference:
        """Return the preference on a machine with this load by other processes."""
        return replace(self.preference, speed_known=load <= OVERLOADED, load=load)


def measure_and_choose(
    request: QuantizeRequest,
    builder: CandidateBuilder,
    results: list[CandidateResult],
    splits: Splits,
    screening: ScreeningReference | None,
) -> tuple[CandidateChoice, MixedPrecision | None]:
    """Measure the finalists, after a mixed precision search where int8 fails the guard.

    Where the result fails the guard on the evaluation data, search again on unused samples and measure once more.
    """
    context, loaded, guard = builder.context, builder.loaded, request.max_quality_drop
    preference = Preference.of(request, loaded)
    if screening is None:
        return measure_candidates(request, context, loaded, select_finalists(results, guard, preference), results), None
    search = MixedPrecisionSearch(request, builder, screening, preference)
    mixed_precision = search_mixed_precision(search, results, mixed_precision_base(results, guard, preference))
    chosen = select_finalists(results, guard, preference)
    final = measure_candidates(request, context, loaded, chosen, results)
    found = retry_mixed_precision(search, splits, results, final, mixed_precision)
    if found is None:
        return final, mixed_precision
    return measure_candidates(request, context, loaded, [*chosen, found.best], results, found.best), found


def measure_candidates(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    chosen: Sequence[CandidateResult],
    results: Sequence[CandidateResult],
    first: CandidateResult | None = None,
) -> CandidateChoice:
    """Measure the original and the finalists in full and choose the artifact.

    The first finalist in the order of preference that passes the guard on the evaluation data is chosen, float32 that
    was not requested after all others; where none does, the first. `first` is a finalist to prefer over all others: the
    result of a further search.
    """
    screened = {id(result): result.speedup for result in chosen}
    rule = CandidateRanking(results, request.max_quality_drop, Preference.of(request, loaded), first)
    doing = f"measuring {', '.join(result.name for result in chosen)} against the original"
    measured = measure_finalists(request, loaded, chosen, rule, Stage(context, doing, (0.55, 0.95)))
    record_failures(measured.timings)
    if all(finalist.entry.reference for finalist in measured.finalists):
        raise next(error for result, error in measured.timings.failed if not result.reference)
    winner = measured.winner.entry
    before = screened[id(winner)]
    return CandidateChoice(measured, rule.under_load(measured.timings.load), winner.speedup / before if before else 1.0)


def record_failures(timings: PairedTimings[CandidateResult]) -> None:
    """Record the error of each finalist that failed as the reason of its status."""
    for result, error in timings.failed:
        result.status, result.why, result.error = "failed", error.reason, error


def replacement_sentence(winner: Finalist, requested: Finalist, guard: float) -> str:
    """Return sentences on float32 that was chosen because the requested scheme fails the guard."""
    quality = requested.quality
    fault = f"loses {quality.drop:.4f}, more than {guard:g}"
    if quality.ruined:
        fault = f"ruins output {', '.join(output.spec.name for output in quality.ruined)}"
    return (
        f"Nothing was quantized: {requested.entry.name} {fault}. Chosen instead: "
        f"{winner.entry.name}, float32 on that engine, which passes the guard."
    )


def gains_of_finalist(chosen: FinalChoice[CandidateResult], finalist: Finalist) -> GainsBy | None:
    """Split the gain of a finalist by engine and precision; None where float32 on its engine was not measured."""
    baseline, timings = Manifest.read(chosen.loaded.baseline), chosen.timings
    runtime = finalist.entry.built.spec.runtime
    original = TimedModel(timings.original, baseline.size_bytes)
    plain = original if runtime == baseline.runtime and baseline.precision == "float32" else None
    for other in timings.timed:
        built = other.entry.built
        if built.spec.scheme == "fp32" and built.spec.runtime == runtime:
            plain = TimedModel(other.timing, built.size_bytes)
    if plain is None:
        return None
    return gains_by(original, plain, TimedModel(finalist.timing, finalist.after.size_bytes), timings.load)


def retry_mixed_precision(
    search: MixedPrecisionSearch,
    splits: Splits,
    results: list[CandidateResult],
    final: CandidateChoice,
    mixed_precision: MixedPrecision | None,
) -> MixedPrecision | None:
    """Search again on unused samples if the preferred calibrated candidate fails the guard on the evaluation data.

    The evaluation data decides only whether there is a second search, not its result.

    Returns:
        The search, whose best candidate passes the guard on those samples with a margin; None where none does.
    """
    failed = final.rejected[0].entry if final.rejected else None
    if failed is None or failed.built.spec.scheme not in CALIBRATED:
        return None
    others = unused_samples(search.request, search.builder.loaded, splits)
    if others is None:
        return None
    first = splits.selection
    samples = Samples([*first.batches, *others.batches], [*first.targets, *others.targets])
    search.builder.context.progress("searching again: the result fails the quality guard on the evaluation data", 0.55)
    plain = mixed_precision.base if mixed_precision is not None else failed
    base = CandidateResult(plain.built, timing=plain.timing)
    try:
        other = _new_reference(search, samples, base)
    except OmgoptimError:  # the measured results remain valid
        return None
    if base.drop is None or passes_guard_with_margin(base, search.request.max_quality_drop):
        return None  # it passes on these samples: a search on them would not change it
    again = replace(search, screening=other, samples_name=f"selection samples, {others.count} of them new,")
    found = search_mixed_precision(again, results, base)
    if found is None or not found.improved:
        return None
    best, guard = found.best, search.request.max_quality_drop
    best.why = best.why or "the best set of layers of a second search, which was not measured in full"
    if best.built.spec.params == failed.built.spec.params:
        return None
    if best.timing is None or not passes_guard_with_margin(best, guard):
        return None
    if dominated_by(best, results, guard, search.preference):
        return None
    best.status, best.why = "finalist", ""
    return found


def _new_reference(search: MixedPrecisionSearch, samples: Samples, base: CandidateResult) -> ScreeningReference:
    """Build the screening reference of these samples and evaluate `base` on them."""
    context, loaded = search.builder.context, search.builder.loaded
    inputs = samples.write(context.work / "selection-again")
    targets = [context.work / "again" / name for name in ("original", "base")]
    with Evaluators(loaded.bench) as evaluators:
        evaluators.begin(base.artifact, base.built.spec.runtime)
        evaluators.run(loaded.baseline, f"original on {Manifest.read(loaded.baseline).runtime}", inputs, targets[0])
        evaluators.run(base.artifact, base.built.spec.runtime, inputs, targets[1])
    other = ScreeningReference.of(loaded, samples, inputs, targets[0], search.request.time_limit_s)
    other.evaluate(base, read_outputs(targets[1]))
    return other
