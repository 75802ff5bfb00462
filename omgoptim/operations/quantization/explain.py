"""Explanation of a quantization: quality loss by layer and known cause, and time by kind of layer.

Noise per layer is simulated, in dB. Recovered quality is measured: each value comes from a candidate that was built,
saved, opened in a fresh process and run on the selection samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.measure.engine_profile import query_time_shares, speedup_bound
from omgoptim.measure.launch import LATENCY
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.candidate_evaluator import CALIBRATED, CandidateEvaluator, Evaluators
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.layer_search import search_layers_of
from omgoptim.operations.quantization.mixed_precision import (
    MixedPrecision,
    MixedPrecisionSearch,
    simulate,
    with_float_layers,
)
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference
from omgoptim.operations.quantization.selection import is_mixed
from omgoptim.operations.verdict import ROUNDING
from omgoptim.reports import Explanation, Finding, LayerNoise, TimeShare
from omgoptim.requests import QuantizeRequest
from omgoptim.techniques.quantize._diagnostics.diagnostics import Diagnostic, diagnose
from omgoptim.techniques.quantize._diagnostics.sensitivity import (
    SensitivityReport,
    measure_sensitivity,
)
from omgoptim.techniques.quantize._diagnostics.simulation import NON_FINITE_DB, Simulation
from omgoptim.techniques.quantize._ptq.state import sqnr_db

RESTORED_LAYERS = 3
"""Worst layers whose recovered quality is measured; each takes a full evaluation."""

NOISE_SHARE = 1 / 3
"""Share of the time limit for the simulation; the rest is for evaluations. Chosen: the evaluations decide."""

EVALUATION_SAMPLES = 64
"""Evaluation inputs whose ranges are compared with the calibrated ones."""

INT8_UNITS = ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm")
"""CPU features with int8 dot products, by the names of /proc/cpuinfo."""


@dataclass(frozen=True, slots=True)
class ExplainedCandidate:
    """Candidate that is explained."""

    result: CandidateResult
    is_artifact: bool
    in_float: int
    """Layers of the artifact that mixed precision keeps in float."""


def explain(
    inputs: MixedPrecisionSearch,
    results: Sequence[CandidateResult],
    winner: CandidateResult,
    mixed_precision: MixedPrecision | None,
) -> Explanation:
    """Explain the quality loss and the speed of the artifact, which must be in its place.

    Explained is the artifact if it is calibrated int8 (with all layers quantized, to show their noise), else the
    calibrated candidate with the smallest loss. Without one, only time is explained.
    """
    request, loaded, screening = inputs.request, inputs.builder.loaded, inputs.screening
    deadline = time.monotonic() + request.guard_time_s
    times, unknown = _times(loaded, inputs.builder.context)
    bound = speedup_bound(times)
    speed = _time_sentence(times, bound, unknown, loaded.bench.cpu_features)
    about = _candidate_to_explain(results, winner, mixed_precision)
    known = Explanation(
        summary="", metric=screening.metric.name, samples=screening.samples, times=times, speedup_bound=bound
    )
    if about is None:
        nothing = "Only time is explained: there is no calibrated int8 candidate (scheme static, with data)."
        return known.model_copy(update={"summary": f"{nothing} {speed}"})
    with Evaluators(loaded.bench) as evaluators:
        names = {result.name for result in results}
        trials = CandidateEvaluator(evaluators, inputs.builder, screening, deadline, reserved_names=names)
        if mixed_precision is not None and mixed_precision.screening is screening:
            trials.known.update(mixed_precision.known)
        return _explain_quality(trials, request, about, known, speed)


def _explain_quality(
    trials: CandidateEvaluator,
    request: QuantizeRequest,
    about: ExplainedCandidate,
    known: Explanation,
    speed: str,
) -> Explanation:
    """Explain layers and findings, each with the quality recovered without it; `speed` ends the summary."""
    screening = trials.screening
    try:
        trials.builder.context.progress("explaining: the noise of each layer", None)
        simulation = simulate(about.result.built.spec.params, trials.builder)
        limit_s = request.guard_time_s * NOISE_SHARE
        noise = measure_sensitivity(simulation, restored=True, limit_s=limit_s)
    except OmgoptimError as error:
        nothing = f"The layers could not be explained: {error.reason}."
        return known.model_copy(update={"summary": f"{nothing} {speed}"})
    layers = _layers(noise, about, trials)
    evaluation = trials.builder.loaded.evaluation.split(EVALUATION_SAMPLES)[0]
    found = _findings(simulation, about, trials, evaluation.batches)
    outputs = about.result.outputs
    whole = None if outputs is None else sqnr_db(screening.original, outputs, NON_FINITE_DB)
    words = [_quality_sentence(about, screening, whole, noise, layers), _findings_sentence(found)]
    if trials.out_of_time():
        words.append(f"The explanation is incomplete: its time limit of {request.guard_time_s:g} s was reached.")
    update = {"summary": " ".join([*filter(None, words), speed]), "sqnr_db": whole, "layers": layers, "findings": found}
    return known.model_copy(update=update)


def _candidate_to_explain(
    results: Sequence[CandidateResult], winner: CandidateResult, mixed_precision: MixedPrecision | None
) -> ExplainedCandidate | None:
    if winner.built.spec.scheme in CALIBRATED:
        if mixed_precision is not None and is_mixed(winner):
            return ExplainedCandidate(mixed_precision.base, True, mixed_precision.best.built.spec.float_layers)
        return ExplainedCandidate(winner, True, 0)
    evaluated = [a for a in results if a.built.spec.scheme in CALIBRATED and not is_mixed(a)]
    alive = [a for a in evaluated if a.drop is not None and a.error is None]
    return ExplainedCandidate(min(alive, key=lambda a: a.drop or 0.0), False, 0) if alive else None


def _times(loaded: LoadedModel, context: RunContext) -> tuple[list[TimeShare], str]:
    """Return the artifact's time by kind of layer, or the reason why it is unknown."""
    bench = loaded.bench
    context.progress("explaining: the time of each kind of layer", None)
    batches = {LATENCY: bench.batches[LATENCY]}
    try:
        with context.measuring(), bench.start(context.artifact, batches) as process:
            process.begin_open()
            process.end_open()
            return query_time_shares(process, LATENCY), "the engine does not report the time of its layers"
    except OmgoptimError as error:  # the rest of the explanation stands without it
        return [], error.reason


def _layers(noise: SensitivityReport, about: ExplainedCandidate, trials: CandidateEvaluator) -> list[LayerNoise]:
    """Return every layer, worst first; of the worst few with the quality recovered in float."""
    drop = about.result.drop or 0.0
    result = []
    for index, (entry, layer) in enumerate(zip(noise.layers, search_layers_of(noise), strict=True)):
        recovered = None
        if index < RESTORED_LAYERS and drop > ROUNDING:
            recovered = _recovered(with_float_layers(about.result.built.spec, [layer.name]), drop, trials)
        result.append(
            LayerNoise(
                path=entry.layer.path,
                kind=entry.layer.op,
                sqnr_db=entry.only_layer_db,
                sqnr_gain_db=None if entry.restored_db is None else entry.restored_db - noise.all_quantized_db,
                recovered=recovered,
                bytes=entry.layer.weight_bytes,
            )
        )
    return result


def _recovered(spec: CandidateSpec, drop: float, trials: CandidateEvaluator) -> float | None:
    """Return the quality gained over the explained candidate; None if it failed or time is out."""
    if trials.out_of_time():
        return None
    named = replace(spec, note=f"explained {trials.evaluations + 1}")
    result = trials.of(named, "explaining")
    return None if result.drop is None or result.error is not None else drop - result.drop


def _findings(
    simulation: Simulation, about: ExplainedCandidate, trials: CandidateEvaluator, evaluation: Sequence[dict[str, Any]]
) -> list[Finding]:
    """Return the known causes of loss that were found, largest recovered quality first."""
    spec, drop = about.result.built.spec, about.result.drop or 0.0
    found = []
    for signature in diagnose(simulation, spec.params, evaluation):
        undone = _spec_without(spec, signature)
        recovered = _recovered(undone, drop, trials) if undone is not None and drop > ROUNDING else None
        found.append(
            Finding(
                name=signature.name,
                paths=signature.paths,
                evidence=signature.evidence,
                fix=signature.fix,
                recovered=recovered,
            )
        )
    return sorted(found, key=lambda finding: -(finding.recovered or 0.0))


def _spec_without(spec: CandidateSpec, signature: Diagnostic) -> CandidateSpec | None:
    """Return the spec without a cause: with other parameters where possible, else with its layers in float."""
    if signature.undo and all(hasattr(spec.params, name) for name in signature.undo):
        return replace(spec, params=spec.params.model_copy(update=signature.undo))
    return with_float_layers(spec, signature.nodes) if signature.nodes else None


def _quality_sentence(
    about: ExplainedCandidate,
    screening: ScreeningReference,
    whole: float | None,
    noise: SensitivityReport,
    layers: Sequence[LayerNoise],
) -> str:
    name = about.result.name
    drop = about.result.drop or 0.0
    metric = screening.metric.name.replace("_", " ")
    decibels = f" (output SQNR {whole:.1f} dB)" if whole is not None else ""
    who = name if about.is_artifact else f"{name}, which is not the artifact,"
    if about.in_float:
        who = f"{name} (the artifact keeps {about.in_float} of its layers in float)"
    loses = f"loses {drop:.4f} {metric}" if drop > ROUNDING else f"loses no {metric}"
    worst = layers[0]
    sentence = (
        f"{who} {loses} on {screening.samples} selection samples{decibels}; "
        f"layer {worst.path} contributes most noise (SQNR {worst.sqnr_db:.1f} dB alone"
    )
    sentence += f", {worst.recovered:+.4f} if kept in float)" if worst.recovered is not None else ")"
    if noise.estimated:
        sentence += f"; {noise.estimated} of {len(layers)} layers were estimated from their weight rounding error"
    return sentence + "."


def _findings_sentence(found: Sequence[Finding]) -> str:
    if not found:
        return "No known cause of quality loss was found."
    parts = [
        f"{finding.name} ({finding.recovered:+.4f} without)" if finding.recovered is not None else finding.name
        for finding in found[:4]
    ]
    return f"Causes of quality loss: {', '.join(parts)}."


def _time_sentence(times: Sequence[TimeShare], bound: float | None, unknown: str, features: Sequence[str]) -> str:
    """Return a sentence on the time by kernel precision and the speedup bound."""
    if not times:
        return f"The time per layer is unknown: {unknown}."
    integers = sum(time.share for time in times if time.quantized)
    floats = next((time for time in times if not time.quantized), None)
    words = f"{integers:.0%} of the artifact's time is in integer kernels"
    if floats is not None:
        words += f", most of {'the rest' if integers else 'it'} in {floats.kind} ({floats.share:.0%})"
    if bound is not None:
        words += f"; faster integer kernels alone give at most {bound:.2f}x"
    if integers and features and not set(features) & set(INT8_UNITS):
        words += "; this processor has no int8 dot product (VNNI), so int8 gains little over float"
    return words + "."
