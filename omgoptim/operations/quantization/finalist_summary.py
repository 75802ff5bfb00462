"""Summary sentences of a finalist of a quantize run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omgoptim.measure.validity_checks import chance_level_summary
from omgoptim.operations.context import RunContext
from omgoptim.operations.gain_attribution import gain_split_sentence, implausible_sentence, slower_sentence
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidatePlan
from omgoptim.operations.quantization.final_race import FinalistResult, FinalRace, replacement_sentence
from omgoptim.operations.quantization.qat import TrainedModel
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import is_float
from omgoptim.operations.verdict import (
    Outcome,
    passes,
    quality_sentence,
    size_phrase,
    verdict_sentence,
)
from omgoptim.reports import Gains, Measurement
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Auto


@dataclass(frozen=True, slots=True)
class QuantizeRun:
    """State of a quantize run after the final measurement."""

    request: QuantizeRequest
    builder: CandidateBuilder
    plan: CandidatePlan
    results: list[CandidateResult]
    final: FinalRace
    notes: list[str]
    trained: TrainedModel | None = None

    @property
    def context(self) -> RunContext:
        """Context of the run."""
        return self.builder.context

    @property
    def loaded(self) -> LoadedModel:
        """The original."""
        return self.builder.loaded


@dataclass(frozen=True, slots=True)
class SavedFinalist:
    """A finalist saved in the run's folder, with its measurement."""

    finalist: FinalistResult
    folder: Path
    after: Measurement
    gained: Gains


def implausible_speedup_sentence(run: QuantizeRun, kept: SavedFinalist) -> str:
    """Return the sentence on an implausible speedup of a finalist; empty where it is plausible."""
    final, finalist = run.final, kept.finalist
    runtime = finalist.result.built.spec.runtime
    return implausible_sentence(finalist.parts, final.before, runtime, run.loaded.device, final.load, finalist.timing)


def finalist_summary(
    run: QuantizeRun, kept: SavedFinalist, everyone: list[SavedFinalist], outcome: Outcome, before: Measurement
) -> str:
    """Return the summary: qualifications, the verdict, gains by cause, and the quality."""
    finalist, guard = kept.finalist, run.request.max_quality_drop
    spec, changes = finalist.result.built.spec, finalist.result.built.outcome
    parts, precision = finalist.parts, kept.after.precision
    implausible = implausible_speedup_sentence(run, kept)
    slower = slower_sentence(parts, spec.runtime, precision)
    verdict = verdict_sentence(outcome, spec.name, kept.gained, finalist.quality, guard)
    split = gain_split_sentence(parts, spec.runtime, precision) if parts else ""
    qualified = [f"{implausible}." if implausible else "", slower, _float_only_sentence(run, kept, everyone)]
    first = [verdict, *qualified] if outcome == "guard_failed" else [*qualified, verdict]
    doubt = chance_level_summary(finalist.quality.metric, finalist.quality.before, run.loaded.evaluation.targets)
    words = [doubt, *first, split, _rejected_sentence(run, kept), quality_sentence(before, finalist.quality)]
    words += [run.trained.fact] if run.trained else []
    words += changes.notes if changes else []
    return " ".join(part for part in words if part)


def is_replacement(run: QuantizeRun, kept: SavedFinalist) -> bool:
    """Return whether this is float32, chosen although not requested, because no requested scheme passes the guard."""
    return kept.finalist is run.final.winner and kept.finalist.result.reference


def _float_only_sentence(run: QuantizeRun, kept: SavedFinalist, everyone: list[SavedFinalist]) -> str:
    """Return a sentence where the chosen candidate is float32, with the best quantized one."""
    if is_replacement(run, kept):
        return replacement_sentence(kept.finalist, run.final.rejected[0], run.request.max_quality_drop)
    if kept.after.precision != "float32" or not isinstance(run.request.scheme, Auto):
        return ""
    best = best_quantized(run, everyone)
    name = kept.finalist.result.built.spec.name
    words = f"The artifact is not quantized: {name} is the float32 model on another engine"
    if best is None:
        return f"{words}, and no quantized candidate was measured in full."
    gained, quality = best.gained, best.finalist.quality
    speed = "speed undecided" if gained.speedup is None else f"{gained.speedup:.2f}x the original's speed"
    return (
        f"{words}. The best quantized candidate, {best.finalist.result.built.spec.name}, is {size_phrase(gained)}, "
        f"{speed}; its quality drop is {quality.drop:.4f}."
    )


def best_quantized(run: QuantizeRun, everyone: list[SavedFinalist]) -> SavedFinalist | None:
    """Return the preferred quantized finalist, of those that pass the guard if any does; None without one."""
    quantized = [kept for kept in everyone if not is_float(kept.finalist.result)]
    guard = run.request.max_quality_drop
    holding = [kept for kept in quantized if passes(kept.finalist.quality, guard)]
    among = holding or quantized
    return max(among, key=lambda kept: run.final.preference.merit(kept.finalist.result), default=None)


def _rejected_sentence(run: QuantizeRun, kept: SavedFinalist) -> str:
    """Return a sentence on preferred candidates that failed the guard on the evaluation data."""
    if kept.finalist is not run.final.winner or not run.final.holds or not run.final.rejected:
        return ""
    if is_replacement(run, kept):
        return ""  # the summary begins with it
    guard = run.request.max_quality_drop
    names = [f"{f.result.built.spec.name} loses {f.quality.drop:.4f}" for f in run.final.rejected]
    return (
        f"On the evaluation data {', '.join(names)}, more than {guard:g}: the next in an order fixed before that data "
        "was read was delivered."
    )
