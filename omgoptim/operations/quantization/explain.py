"""explain: where quality went, layer by layer and with known causes, and where the time of the artifact goes.

What is simulated (noise per layer) is told in dB; what is told as recovered quality is measured, each on a candidate of
its own that was made, saved, opened in a fresh process and run on the selection samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.hardware import cpu_features
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.time_shares import query_time_shares, speedup_bound
from omgoptim.measure.timing import LATENCY
from omgoptim.models.samples import Samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.candidate_evaluator import CALIBRATED, CandidateEvaluator, Evaluators
from omgoptim.operations.quantization.candidates import Option, Program
from omgoptim.operations.quantization.mixed_precision import MixedPrecision, keepable, keeping, simulate
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference
from omgoptim.operations.verdict import ROUNDING
from omgoptim.reports import Explanation, Finding, LayerNoise, TimeShare
from omgoptim.requests import QuantizeRequest
from omgoptim.techniques.quantize._diagnostics.activation_diagnostics import diagnose
from omgoptim.techniques.quantize._diagnostics.graph_diagnostics import Diagnostic
from omgoptim.techniques.quantize._diagnostics.sensitivity import (
    LayerSensitivity,
    SensitivityReport,
    measure_sensitivity,
)
from omgoptim.techniques.quantize._diagnostics.simulation import NON_FINITE_DB, Simulation
from omgoptim.techniques.quantize._ptq.sqnr import sqnr_db

RESTORED = 3
"""Worst layers whose recovered quality is measured."""

NOISE_SHARE = 1 / 3
"""Part of the time that the simulation may take."""

EVALUATION_SAMPLES = 64
"""Evaluation inputs whose ranges are compared with the calibrated ones."""

INT8_UNITS = ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm")


@dataclass(frozen=True, slots=True)
class Explained:
    """What an explanation is about."""

    result: CandidateResult
    is_artifact: bool
    in_float: int
    """Layers that the guard kept in float in the artifact."""


def explain(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    results: Sequence[CandidateResult],
    winner: CandidateResult,
    mixed_precision: MixedPrecision | None,
    calibration: Samples,
    screening: ScreeningReference,
    clock: Callable[[], float] = time.monotonic,
) -> Explanation:
    """Why quality fell, and why it is not faster. The artifact is in its place when this is called.

    Told of the artifact if it is int8 from calibration data (without the layers that the guard kept in float, whose
    noise is what matters), else of the calibrated candidate that lost least. Without one, only time is told.
    """
    deadline = clock() + request.guard_time_s
    times, unknown = _times(loaded, context)
    bound = speedup_bound(times)
    about = _explained(results, winner, mixed_precision)
    known = Explanation(
        summary="", metric=screening.metric.name, samples=screening.samples, times=times, speedup_bound=bound
    )
    if about is None:
        nothing = (
            "Only time is explained: no int8 candidate from calibration data was tried (scheme static, with data)."
        )
        return known.model_copy(update={"summary": f"{nothing} {_speed_words(times, bound, unknown)}"})
    with Evaluators(loaded.bench) as evaluators:
        trials = CandidateEvaluator(
            evaluators,
            context,
            loaded,
            program,
            calibration,
            screening,
            request.seed,
            deadline,
            clock,
            taken={result.made.option.name for result in results},
        )
        return _explained_by(trials, request, about, known, (times, bound, unknown), mixed_precision)


def _explained_by(
    trials: CandidateEvaluator,
    request: QuantizeRequest,
    about: Explained,
    known: Explanation,
    speed: tuple[list[TimeShare], float | None, str],
    mixed_precision: MixedPrecision | None,
) -> Explanation:
    """Layers and findings, each with what undoing it brings."""
    context, loaded, program, clock = trials.context, trials.loaded, trials.program, trials.clock
    calibration, screening = trials.calibration, trials.screening
    times, bound, unknown = speed
    if mixed_precision is not None and mixed_precision.screening is screening:
        trials.known.update(mixed_precision.known)
    try:
        context.progress("explaining: the noise of each layer", None)
        simulation = simulate(about.result.made.option.params, loaded, program, calibration)
        limit_s = request.guard_time_s * NOISE_SHARE
        noise = measure_sensitivity(simulation, restored=True, limit_s=limit_s, clock=clock)
    except OmgoptimError as error:
        nothing = f"The layers could not be explained: {error.what}: {error.why}."
        return known.model_copy(update={"summary": f"{nothing} {_speed_words(times, bound, unknown)}"})
    layers = _layers(noise, about, trials)
    found = _findings(simulation, about, trials, loaded.evaluation.split(EVALUATION_SAMPLES)[0].batches)
    whole = _sqnr(about.result, screening)
    words = [_quality_words(about, screening, whole, noise, layers), _finding_words(found)]
    if trials.out_of_time():
        words.append(f"Not all was tried: the time of {request.guard_time_s:g} s was spent.")
    words.append(_speed_words(times, bound, unknown))
    update = {"summary": " ".join(filter(None, words)), "sqnr_db": whole, "layers": layers, "findings": found}
    return known.model_copy(update=update)


def _explained(
    results: Sequence[CandidateResult], winner: CandidateResult, mixed_precision: MixedPrecision | None
) -> Explained | None:
    if winner.made.option.scheme in CALIBRATED:
        if mixed_precision is not None and winner.made.option.note:
            return Explained(mixed_precision.base, True, len(mixed_precision.ignore))
        return Explained(winner, True, 0)
    tried = [a for a in results if a.made.option.scheme in CALIBRATED and not a.made.option.note]
    alive = [a for a in tried if a.drop is not None and a.error is None]
    return Explained(min(alive, key=lambda a: a.drop or 0.0), False, 0) if alive else None


def _times(loaded: LoadedModel, context: RunContext) -> tuple[list[TimeShare], str]:
    """Time per kind of layer of the artifact, or why there is none."""
    bench = loaded.bench
    context.progress("explaining: the time of each kind of layer", None)
    batches = {LATENCY: bench.batches[LATENCY]}
    try:
        with (
            context.measuring(),
            MeasuringProcess(
                context.artifact,
                threads=bench.threads,
                batches=batches,
                cwd=bench.cwd,
                device=bench.device,
                policy=bench.policy,
            ) as process,
        ):
            process.begin_open()
            process.end_open()
            return query_time_shares(process, LATENCY), "the engine does not tell how long its layers take"
    except OmgoptimError as error:  # the rest of the explanation stands without it
        return [], f"{error.what}: {error.why}"


def _sqnr(result: CandidateResult, screening: ScreeningReference) -> float | None:
    return sqnr_db(screening.original, result.outputs, NON_FINITE_DB) if result.outputs is not None else None


def _layers(noise: SensitivityReport, about: Explained, trials: CandidateEvaluator) -> list[LayerNoise]:
    """Every layer, the worst first; of the worst few also what keeping it in float brings."""
    drop = about.result.drop or 0.0
    result = []
    for index, (entry, layer) in enumerate(zip(noise.layers, keepable(noise), strict=True)):
        recovered = None
        if index < RESTORED and drop > ROUNDING:
            recovered = _recovered(keeping(about.result.made.option, [layer.name]), drop, trials)
        result.append(_layer(entry, noise.whole_db, recovered))
    return result


def _layer(entry: LayerSensitivity, whole_db: float, recovered: float | None) -> LayerNoise:
    gain = None if entry.restored_db is None else entry.restored_db - whole_db
    layer = entry.layer
    return LayerNoise(
        path=layer.path,
        kind=layer.op,
        sqnr_db=entry.alone_db,
        sqnr_gain_db=gain,
        recovered=recovered,
        bytes=layer.weight_bytes,
    )


def _recovered(option: Option, drop: float, trials: CandidateEvaluator) -> float | None:
    """Quality that this option has more than the explained one; None if it failed or time is out."""
    if trials.out_of_time():
        return None
    named = replace(option, note=f"explained {trials.evaluations + 1}")
    result = trials.of(named, "explaining")
    return None if result.drop is None or result.error is not None else drop - result.drop


def _findings(
    simulation: Simulation, about: Explained, trials: CandidateEvaluator, evaluation: Sequence[dict[str, Any]]
) -> list[Finding]:
    """What is known to hurt and was found here, with what undoing it brought; the most first."""
    option, drop = about.result.made.option, about.result.drop or 0.0
    found = []
    for signature in diagnose(simulation, option.params, evaluation):
        undone = _undone(option, signature)
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


def _undone(option: Option, signature: Diagnostic) -> Option | None:
    """The option without what was found: other parameters where it has them, else those layers in float."""
    if signature.undo and all(hasattr(option.params, name) for name in signature.undo):
        return replace(option, params=option.params.model_copy(update=signature.undo))
    return keeping(option, signature.nodes) if signature.nodes else None


def _quality_words(
    about: Explained,
    screening: ScreeningReference,
    whole: float | None,
    noise: SensitivityReport,
    layers: Sequence[LayerNoise],
) -> str:
    name = about.result.made.option.name
    drop = about.result.drop or 0.0
    metric = screening.metric.name.replace("_", " ")
    decibels = f", its output at {whole:.1f} dB over the noise" if whole is not None else ""
    who = name if about.is_artifact else f"{name}, which is not the artifact,"
    if about.in_float:
        who = f"{name} (of which the artifact keeps {about.in_float} in float)"
    loses = f"loses {drop:.4f} {metric}" if drop > ROUNDING else f"loses no {metric}"
    worst = layers[0]
    sentence = (
        f"{who} {loses} on {screening.samples} selection samples{decibels}; "
        f"layer {worst.path} disturbs it most ({worst.sqnr_db:.1f} dB alone"
    )
    sentence += f", {worst.recovered:+.4f} with it in float)" if worst.recovered is not None else ")"
    if noise.estimated:
        sentence += f"; {noise.estimated} of {len(layers)} layers were estimated from their own rounding"
    return sentence + "."


def _finding_words(found: Sequence[Finding]) -> str:
    if not found:
        return "No known cause was found."
    parts = [
        f"{finding.name} ({finding.recovered:+.4f} without)" if finding.recovered is not None else finding.name
        for finding in found[:4]
    ]
    return f"Found: {', '.join(parts)}."


def _speed_words(times: Sequence[TimeShare], bound: float | None, unknown: str) -> str:
    """One sentence on where the time goes and what bounds it."""
    if not times:
        return f"Time per layer is not known: {unknown}."
    integers = sum(time.share for time in times if time.quantized)
    floats = next((time for time in times if not time.quantized), None)
    words = f"{integers:.0%} of the artifact's time is in integer kernels"
    if floats is not None:
        words += f", most of {'the rest' if integers else 'it'} in {floats.kind} ({floats.share:.0%})"
    if bound is not None:
        words += f": faster integers alone could bring {bound:.2f}x at most"
    features = cpu_features()
    if integers and features and not set(features) & set(INT8_UNITS):
        words += "; this processor has no int8 dot product (VNNI), so int8 gains little over float"
    return words + "."
