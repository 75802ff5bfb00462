"""Final measurement of the finalists of a quantize run, their order, and the gains of the chosen one by cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.models.manifest import Manifest
from omgoptim.operations.context import RunContext, Stage
from omgoptim.operations.final_measurement import (
    DeliveryRule,
    FinalChoice,
    FinalRace,
    MeasuredEntry,
    TimedEntry,
    measure_finalists,
)
from omgoptim.operations.gain_attribution import TimedModel, gains_by
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.coverage import read_kernels
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference, ordered
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
        asked = [finalist for finalist in self.measured.finalists if not finalist.entry.reference]
        return asked[: asked.index(winner)] if self.measured.holds and winner in asked else asked


@dataclass(frozen=True, slots=True)
class CandidateOrder(DeliveryRule[CandidateResult]):
    """Order of preference of candidates: those that pass the guard on the selection samples, others, references."""

    results: Sequence[CandidateResult]
    """All candidates, any of which may dominate a finalist."""
    guard: float
    preference: Preference
    """Of the request, for an idle machine."""
    first: CandidateResult | None = None
    """The finalist to prefer over all others: the result of a further search."""

    def ran(self, result: CandidateResult, process: MeasuringProcess) -> None:
        """Read the kernels of the engine."""
        result.kernels = read_kernels(process)

    def order(self, race: FinalRace[CandidateResult]) -> list[TimedEntry[CandidateResult]]:
        """Return the finalists in the order of preference; the timing of each becomes that of its candidate."""
        record_failures(race)
        timed = {id(one.entry): one for one in race.timed}
        for one in race.timed:
            one.entry.timing = one.timing
        finished = [one.entry for one in race.timed]
        others = [result for result in self.results if result not in finished]
        preference = self.under_load(race.load)
        held = [a for a in ordered([*finished, *others], self.guard, preference) if a in finished]
        rest = [result for result in finished if result not in held]
        references = preference.ranked([result for result in rest if result.reference])
        order = [*held, *(a for a in rest if not a.reference), *references]
        if self.first is not None and self.first in order:
            order = [self.first, *(a for a in order if a is not self.first)]
        return [timed[id(result)] for result in order]

    def under_load(self, load: float) -> Preference:
        """Return the preference on a machine with this load by other processes."""
        return replace(self.preference, speed_known=load <= OVERLOADED, load=load)


def final_race(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    chosen: Sequence[CandidateResult],
    results: Sequence[CandidateResult],
    first: CandidateResult | None = None,
) -> CandidateChoice:
    """Measure the original and the finalists in full and choose the artifact.

    The first finalist in the order of preference that passes the guard on the evaluation data is chosen, float32 that
    was not requested after all others; where none does, the first.

    Args:
        request: with the guard, the timing and the seed.
        context: of the run.
        loaded: the original with its data.
        chosen: the finalists.
        results: all candidates.
        first: the finalist to prefer over all others: the result of a further search.
    """
    screened = {id(result): result.speedup for result in chosen}
    rule = CandidateOrder(results, request.max_quality_drop, Preference.of(request, loaded), first)
    doing = f"measuring {', '.join(result.name for result in chosen)} against the original"
    measured = measure_finalists(request, loaded, chosen, rule, Stage(context, doing, (0.55, 0.95)))
    record_failures(measured.race)
    if all(finalist.entry.reference for finalist in measured.finalists):
        raise next(error for result, error in measured.race.failed if not result.reference)
    winner = measured.winner.entry
    before = screened[id(winner)]
    return CandidateChoice(measured, rule.under_load(measured.race.load), winner.speedup / before if before else 1.0)


def record_failures(race: FinalRace[CandidateResult]) -> None:
    """Record the error of each finalist that failed as the reason of its status."""
    for result, error in race.failed:
        result.status, result.why, result.error = "failed", error.reason, error


def replacement_sentence(winner: Finalist, asked: Finalist, guard: float) -> str:
    """Return sentences on float32 that was chosen because the requested scheme fails the guard."""
    quality = asked.quality
    fault = f"loses {quality.drop:.4f}, more than {guard:g}"
    if quality.ruined:
        fault = f"ruins output {', '.join(output.spec.name for output in quality.ruined)}"
    return (
        f"Nothing was quantized: {asked.entry.name} {fault}. Chosen instead: "
        f"{winner.entry.name}, float32 on that engine, which passes the guard."
    )


def gain_split(chosen: FinalChoice[CandidateResult], finalist: Finalist) -> GainsBy | None:
    """Split the gain of a finalist by engine and precision; None where float32 on its engine was not measured."""
    baseline, race = Manifest.read(chosen.loaded.baseline), chosen.race
    runtime = finalist.entry.built.spec.runtime
    original = TimedModel(race.original, baseline.size_bytes)
    plain = original if runtime == baseline.runtime and baseline.precision == "float32" else None
    for other in race.timed:
        built = other.entry.built
        if built.spec.scheme == "fp32" and built.spec.runtime == runtime:
            plain = TimedModel(other.timing, built.size_bytes)
    if plain is None:
        return None
    return gains_by(original, plain, TimedModel(finalist.timing, finalist.after.size_bytes), race.load)
