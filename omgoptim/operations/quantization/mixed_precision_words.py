"""How a search for layers to keep in float ended, as a record and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.operations.quantization.layer_search import Found, Keepable
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.verdict import holds
from omgoptim.reports import Guard
from omgoptim.requests import QuantizeRequest
from omgoptim.techniques.quantize._diagnostics.sensitivity import LayerSensitivity, SensitivityReport

NAMED = 4
"""Layers that a sentence names."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a search worked on and ended with."""

    found: Found
    layers: Sequence[Keepable]
    noise: SensitivityReport | None
    unknown: str
    """Why the layers could not be ranked, where they could not."""
    base: CandidateResult
    best: CandidateResult
    evaluations: int
    seconds: float


def guard_record(ended: Ended, request: QuantizeRequest, judged_on: str, samples: int) -> Guard:
    """The search as a report has it.

    Args:
        judged_on: the samples that judged, in words with their number.
    """
    found, layers, noise, base, best = ended.found, ended.layers, ended.noise, ended.base, ended.best
    limit, drop = request.max_quality_drop, best.drop if best.drop is not None else math.inf
    by_name = {layer.name: layer for layer in layers}
    kept = [by_name[name] for name in found.best.kept]
    stopped = f"its time of {request.guard_time_s:g} s was spent" if found.out_of_time else None
    safely = holds(found.best.drop, limit)
    held = safely or holds(drop, limit)
    plain = f"On {judged_on} {base.made.option.name} loses {base.drop:.4f}"
    if held and kept:
        named = _named([layer.path for layer in kept])
        why = f"{plain} with all layers in int8, and {drop:.4f} with {named} in float, within {limit:g}"
        if stopped:
            why += f"; fewer layers might do, but {stopped}"
        elif not safely:
            why += f", but too near to it for {samples} samples to be sure"
    elif held:
        why = f"{plain}, within {limit:g} but too near to it for {samples} samples to be sure"
        why += "; no layers in float that were tried lose less"
    elif noise is None:
        why = f"{plain}, and its layers could not be ranked: {ended.unknown}"
    else:
        why = f"{plain}, more than {limit:g}; {_worst_words(noise.layers)}"
        if kept:
            why += f"; with {count_words(len(kept))} in float it still loses {drop:.4f}"
        if found.trials:
            why += f", the least of {len(found.trials)} sets that were tried" if kept else "; no set tried loses less"
        if stopped:
            why += f"; {stopped}"
    if found.cannot_pay and not safely:
        why += "; with more layers in float it would not be worth its loss beside a float candidate"
        stopped = stopped or "more layers in float could not pay"
    return Guard(
        kept_in_float=[layer.path for layer in kept],
        float_bytes=sum(layer.size_bytes for layer in kept),
        evaluations=ended.evaluations,
        quality_drop=drop,
        samples=samples,
        holds=held,
        seconds=ended.seconds,
        stopped=stopped,
        out_of_time=found.out_of_time,
        why=why + ".",
    )


def _named(paths: Sequence[str]) -> str:
    """`layers a, b, c, d and 3 others`."""
    shown = f"layer{'s' if len(paths) != 1 else ''} {', '.join(paths[:NAMED])}"
    return shown if len(paths) <= NAMED else f"{shown} and {len(paths) - NAMED} others"


def _worst_words(layers: Sequence[LayerSensitivity]) -> str:
    worst = ", ".join(f"{entry.layer.path} ({entry.alone_db:.1f} dB alone)" for entry in layers[:3])
    return f"most noise comes from {worst}"


def count_words(layers: int) -> str:
    """`1 layer`, `3 layers`."""
    return f"{layers} layer{'s' if layers != 1 else ''}"
