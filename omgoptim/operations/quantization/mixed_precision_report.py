"""Report of a mixed precision search: its record, sentences, and next step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omgoptim.operations.next_steps import same_arguments, step
from omgoptim.operations.quantization.layer_search import LayerSearchResult, SearchLayer
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.verdict import holds
from omgoptim.reports import EfficiencyReport, Guard
from omgoptim.requests import QuantizeRequest
from omgoptim.techniques.quantize._diagnostics.sensitivity import LayerSensitivity, SensitivityReport
from omgoptim.text import plural

if TYPE_CHECKING:
    from omgoptim.operations.quantization.final_race import CandidateChoice
    from omgoptim.operations.quantization.mixed_precision import MixedPrecision

NAMED_LAYERS = 4
"""Number of layers that a sentence names, to keep it short."""


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """Inputs and result of a mixed precision search, for its report."""

    request: QuantizeRequest
    found: LayerSearchResult
    layers: Sequence[SearchLayer]
    noise: SensitivityReport | None
    unknown: str
    """Reason why the layers could not be ranked, if so."""
    base: CandidateResult
    best: CandidateResult
    evaluations: int
    seconds: float
    rounded: CandidateResult | None = None
    """`base` with AdaRound, if that was tried."""

    @property
    def kept(self) -> list[SearchLayer]:
        """Layers in float of the best set."""
        by_name = {layer.name: layer for layer in self.layers}
        return [by_name[name] for name in self.found.best.kept]

    @property
    def drop(self) -> float:
        """Quality drop of the best candidate; infinite where unknown."""
        return math.inf if self.best.drop is None else self.best.drop

    @property
    def holds_with_margin(self) -> bool:
        """True if the drop of the best set passes the guard with its margin."""
        return holds(self.found.best.drop, self.request.max_quality_drop)

    @property
    def holds(self) -> bool:
        """True if the drop passes the guard, with or without its margin."""
        return self.holds_with_margin or holds(self.drop, self.request.max_quality_drop)


def mixed_precision_record(ended: SearchOutcome, samples: int, samples_name: str) -> Guard:
    """Return the report's record of the search.

    Args:
        ended: layers in float, evaluations and time of the search.
        samples: number of the evaluation samples.
        samples_name: their name.
    """
    found, kept = ended.found, ended.kept
    stopped = f"the time limit of {ended.request.guard_time_s:g} s was reached" if found.out_of_time else None
    why = _reason(ended, samples, samples_name, stopped)
    if found.not_worthwhile and not ended.holds_with_margin:
        why += "; more layers in float are not worthwhile: a float candidate is about as good"
        stopped = stopped or "more layers in float are not worthwhile"
    return Guard(
        kept_in_float=[layer.path for layer in kept],
        float_bytes=sum(layer.size_bytes for layer in kept),
        evaluations=ended.evaluations,
        quality_drop=ended.drop,
        samples=samples,
        holds=ended.holds,
        seconds=ended.seconds,
        stopped=stopped,
        out_of_time=found.out_of_time,
        why=why + ".",
    )


def _reason(ended: SearchOutcome, samples: int, samples_name: str, stopped: str | None) -> str:
    """Return the reason for the result of a search, without the final period."""
    limit, kept, drop, noise, base = ended.request.max_quality_drop, ended.kept, ended.drop, ended.noise, ended.base
    plain = f"On {samples} {samples_name} {base.name} loses {base.drop:.4f}"
    rounded = _adaround_phrase(ended)
    if ended.holds and (kept or ended.best is ended.rounded):
        named = f"with {_named([layer.path for layer in kept])} in float" if kept else "with AdaRound on all layers"
        why = f"{plain} with all layers in int8{rounded}, and {drop:.4f} {named}, within {limit:g}"
        if stopped:
            why += f"; fewer layers may suffice, but {stopped}"
        elif not ended.holds_with_margin:
            why += f", too close to the guard for {samples} samples to decide"
    elif ended.holds:
        why = f"{plain}, within {limit:g} but too close to the guard for {samples} samples to decide"
        why += "; no evaluated set of layers in float loses less"
    elif noise is None:
        why = f"{plain}, and its layers could not be ranked: {ended.unknown}"
    else:
        why = f"{plain}{rounded}, more than {limit:g}; {_noisiest_layers(noise.layers)}"
        if kept:
            why += f"; with {plural(len(kept), 'layer')} in float it still loses {drop:.4f}"
        if ended.found.trials:
            why += (
                f", the smallest loss of {plural(len(ended.found.trials), 'evaluated set')}"
                if kept
                else "; no evaluated set loses less"
            )
        if stopped:
            why += f"; {stopped}"
    return why


def _adaround_phrase(ended: SearchOutcome) -> str:
    """Return `, 0.0312 with AdaRound`; empty where that was not tried or is the result."""
    rounded = ended.rounded
    if rounded is None or rounded is ended.best:
        return ""
    return f", {rounded.drop:.4f} with AdaRound" if rounded.drop is not None else ""


def _named(paths: Sequence[str]) -> str:
    """`layers a, b, c, d and 3 others`."""
    shown = f"layer{'' if len(paths) == 1 else 's'} {', '.join(paths[:NAMED_LAYERS])}"
    return shown if len(paths) <= NAMED_LAYERS else f"{shown} and {len(paths) - NAMED_LAYERS} others"


def _noisiest_layers(layers: Sequence[LayerSensitivity]) -> str:
    worst = ", ".join(f"{entry.layer.path} ({entry.only_layer_db:.1f} dB alone)" for entry in layers[:3])
    return f"the layers with the lowest SQNR are {worst}"


def with_mixed_precision(
    report: EfficiencyReport, request: QuantizeRequest, mixed_precision: MixedPrecision | None, final: CandidateChoice
) -> EfficiencyReport:
    """Add the search to the report: its result in the summary, and a call that builds the same candidate."""
    if mixed_precision is None:
        return report
    winner = final.measured.winner.entry
    record = mixed_precision.record
    update: dict[str, object] = {"guard": record}
    chosen = mixed_precision.improved and winner.built.spec.params == mixed_precision.best.built.spec.params
    if chosen or not record.holds:
        update["summary"] = f"{report.summary} {record.why}"
    elif mixed_precision.improved and mixed_precision.best.why:
        why = mixed_precision.best.why
        update["summary"] = f"{report.summary} Mixed precision ({mixed_precision.best.name}) was not chosen: {why}."
    if chosen:
        spec = winner.built.spec
        at_once = request.model_copy(update={"scheme": spec.params, "runtime": spec.runtime})
        why = "trains again" if spec.scheme == "qat" else "builds a candidate"
        again = step("quantize", same_arguments(at_once), f"{why} with these settings, without a search")
        update["next_steps"] = [*report.next_steps[:2], again]
    elif record.out_of_time and not record.holds:
        longer = same_arguments(request) | {"guard_time_s": 4 * request.guard_time_s}
        again = step("quantize", longer, "the mixed precision search reached its time limit")
        update["next_steps"] = [*report.next_steps[:2], again]
    return report.model_copy(update=update)
