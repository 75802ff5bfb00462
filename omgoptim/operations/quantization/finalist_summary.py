"""Summary sentences of a finalist of a quantize run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.operations.final_measurement import FinalChoice
from omgoptim.operations.gain_attribution import gain_split_sentence, slower_sentence
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidatePlan
from omgoptim.operations.quantization.final_race import CandidateChoice, Finalist, replacement_sentence
from omgoptim.operations.quantization.qat import TrainedModel
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import is_float
from omgoptim.operations.verdict import passes, quality_sentence, size_phrase, verdict_sentence
from omgoptim.reports import GainsBy
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Auto


@dataclass(frozen=True, slots=True)
class QuantizeRun:
    """State of a quantize run after the final measurement."""

    request: QuantizeRequest
    builder: CandidateBuilder
    plan: CandidatePlan
    results: list[CandidateResult]
    final: CandidateChoice
    notes: list[str]
    trained: TrainedModel | None = None

    @property
    def chosen(self) -> FinalChoice[CandidateResult]:
        """The measured finalists and the chosen one."""
        return self.final.measured

    @property
    def loaded(self) -> LoadedModel:
        """The original."""
        return self.builder.loaded


def finalist_summary(run: QuantizeRun, finalist: Finalist, parts: GainsBy | None) -> str:
    """Return the summary: qualifications, the verdict, gains by cause, and the quality."""
    chosen, quality, precision = run.chosen, finalist.quality, finalist.after.precision
    spec, changes = finalist.entry.built.spec, finalist.entry.built.outcome
    outcome = chosen.outcome(finalist)
    implausible = chosen.implausible(finalist, parts)
    slower = slower_sentence(parts, spec.runtime, precision)
    verdict = verdict_sentence(outcome, spec.name, finalist.gains, quality, chosen.guard)
    split = gain_split_sentence(parts, spec.runtime, precision) if parts else ""
    qualified = [f"{implausible}." if implausible else "", slower, _float_only_sentence(run, finalist)]
    first = [verdict, *qualified] if outcome == "guard_failed" else [*qualified, verdict]
    words = [chosen.chance_level(finalist), *first, split, _rejected_sentence(run, finalist)]
    words += [quality_sentence(finalist.before, quality)]
    words += [run.trained.fact] if run.trained else []
    words += changes.notes if changes else []
    return " ".join(part for part in words if part)


def is_replacement(run: QuantizeRun, finalist: Finalist) -> bool:
    """Return whether this is float32, chosen although not requested, because no requested scheme passes the guard."""
    return finalist is run.chosen.winner and finalist.entry.reference


def _float_only_sentence(run: QuantizeRun, finalist: Finalist) -> str:
    """Return a sentence where the chosen candidate is float32, with the best quantized one."""
    if is_replacement(run, finalist):
        return replacement_sentence(finalist, run.final.rejected[0], run.chosen.guard)
    if finalist.after.precision != "float32" or not isinstance(run.request.scheme, Auto):
        return ""
    best = best_quantized(run, run.chosen.finalists)
    words = f"The artifact is not quantized: {finalist.entry.name} is the float32 model on another engine"
    if best is None:
        return f"{words}, and no quantized candidate was measured in full."
    speed = "speed undecided" if best.gains.speedup is None else f"{best.gains.speedup:.2f}x the original's speed"
    return (
        f"{words}. The best quantized candidate, {best.entry.name}, is {size_phrase(best.gains)}, "
        f"{speed}; its quality drop is {best.quality.drop:.4f}."
    )


def best_quantized(run: QuantizeRun, finalists: Sequence[Finalist]) -> Finalist | None:
    """Return the preferred quantized finalist, of those that pass the guard if any does; None without one."""
    quantized = [finalist for finalist in finalists if not is_float(finalist.entry)]
    holding = [finalist for finalist in quantized if passes(finalist.quality, run.chosen.guard)]
    return max(holding or quantized, key=lambda finalist: run.final.preference.merit(finalist.entry), default=None)


def _rejected_sentence(run: QuantizeRun, finalist: Finalist) -> str:
    """Return a sentence on preferred candidates that failed the guard on the evaluation data."""
    chosen, rejected = run.chosen, run.final.rejected
    if finalist is not chosen.winner or not chosen.holds or not rejected or is_replacement(run, finalist):
        return ""  # the summary begins with a replacement
    names = [f"{other.entry.name} loses {other.quality.drop:.4f}" for other in rejected]
    return (
        f"On the evaluation data {', '.join(names)}, more than {chosen.guard:g}: the artifact is the next candidate of "
        "an order fixed before that data was read."
    )
