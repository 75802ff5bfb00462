"""The guard: where int8 from calibration data loses too much, find the few layers that must stay in float.

Layers are ranked by their simulated noise at the model's output (`_diagnostics/sensitivity.py`), so that only few sets
get a full evaluation, and `guard_search.py` decides which. An evaluation is a candidate like any other: made, saved,
opened in the measuring process of its engine and run on the selection samples, the same for it and the original.
What the search ends with is proved in a fresh process, as every finalist is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.program_macs import count_program
from omgoptim.measure.timing import SCREENING_PLAN, Ratio, Timing, time_artifacts
from omgoptim.models.globs import matches
from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.models.samples import Samples, repeat_to_size
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.candidate_evaluator import CALIBRATED, CandidateEvaluator, Evaluators
from omgoptim.operations.quantization.candidates import Option, Program
from omgoptim.operations.quantization.layer_search import Keepable, search
from omgoptim.operations.quantization.mixed_precision_words import Ended, count_words, guard_record
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, within, within_safely
from omgoptim.operations.quantization.selection import WORTH_MIXING, Preference, alive, is_float
from omgoptim.operations.verdict import holds
from omgoptim.reports import Guard
from omgoptim.requests import Params, QuantizeRequest
from omgoptim.techniques.quantize._diagnostics.sensitivity import SensitivityReport, measure_sensitivity
from omgoptim.techniques.quantize._diagnostics.simulation import Simulation, build_simulation

RANKING_SHARE = 1 / 3
"""Part of the guard's time that ranking the layers may take."""

Predict = Callable[[tuple[str, ...]], float]
"""Noise over signal at the output with the layers of these names in float."""

FLOAT_BYTES = 4
"""Bytes of a float32 weight, whose int8 takes one."""


@dataclass(frozen=True, slots=True)
class MixedPrecision:
    """How the search ended."""

    record: Guard
    option: Option
    """The candidate that it ended with; the plain one if nothing better was found."""
    ignore: list[str]
    """What `ignore` must name to get that candidate at once."""
    base: CandidateResult
    """The candidate without layers in float that it began with."""
    best: CandidateResult
    """The one that it ended with; `base` if nothing better was found."""
    known: dict[str, CandidateResult]
    """What was evaluated: `CandidateEvaluator.known`."""
    screening: ScreeningReference
    """The samples that judged."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a search for layers to keep in float works on."""

    request: QuantizeRequest
    context: RunContext
    loaded: LoadedModel
    program: Program
    calibration: Samples
    screening: ScreeningReference
    """The samples that judge, and what the original gives for them."""
    preference: Preference
    judged_on: str = "selection samples"
    """What these samples are, in words."""


def repair(
    given: Search,
    results: list[CandidateResult],
    base: CandidateResult | None,
    clock: Callable[[], float] = time.monotonic,
) -> MixedPrecision | None:
    """Search for the layers to keep in float.

    What it tries is added to `results`; the best of it is timed like the others, on every engine that its plain
    sibling was tried on.

    Args:
        base: the candidate without layers in float to start from, judged on these samples; see `worth_repairing`.

    Returns:
        How it ended; None where there was nothing to do.
    """
    request, context, program = given.request, given.context, given.program
    if base is None or base.drop is None or base.made.folder is None or program.path is None:
        return None
    start, guard = clock(), request.max_quality_drop
    with Evaluators(given.loaded.bench) as evaluators:
        evaluators.begin(base.made.folder, base.made.option.runtime)  # starts while the layers are ranked
        trials = CandidateEvaluator(
            evaluators,
            context,
            given.loaded,
            program,
            given.calibration,
            given.screening,
            request.seed,
            start + request.guard_time_s,
            clock,
            taken={result.made.option.name for result in results},
        )
        limit_s = request.guard_time_s * RANKING_SHARE
        params = base.made.option.params
        noise, predict, unknown = _ranking(params, given.loaded, program, given.calibration, context, limit_s)
        layers = keepable(noise) if noise else []

        def option_of(kept: tuple[str, ...]) -> Option:
            return keeping(base.made.option, kept)

        def evaluate(kept: tuple[str, ...]) -> float:
            result = trials.of(option_of(kept), f"guard: {count_words(len(kept))} in float")
            return result.cautious_drop(guard)

        pays = _pays(given, base, results, noise) if noise else (lambda _: True)
        cautious = base.cautious_drop(guard)
        found = search(layers, cautious, guard, evaluate, trials.out_of_time, holds, predict, pays)
        best = trials.of(option_of(found.best.kept), "guard") if found.best.kept else base
        _tell(trials.results, guard)
        if best is not base:
            _time_it(given, trials, results, base, best)
    results.extend(trials.results)
    ended = Ended(found, layers, noise, unknown, base, best, trials.evaluations, clock() - start)
    record = guard_record(ended, request, f"{given.screening.samples} {given.judged_on}", given.screening.samples)
    return MixedPrecision(record, best.made.option, list(found.best.kept), base, best, trials.known, given.screening)


def worth_repairing(results: Sequence[CandidateResult], guard: float, preference: Preference) -> CandidateResult | None:
    """The calibrated candidate to start from: the one that loses least, on its best engine.

    None if one of them holds the guard as it is, with a margin, or if another that does so is as good: layers in float
    only make it slower and larger.
    """
    usable = [result for result in alive(results) if not result.reference]
    calibrated = [result for result in usable if result.made.option.scheme in CALIBRATED]
    if not calibrated or any(within_safely(result, guard) for result in calibrated):
        return None
    closest = min(calibrated, key=lambda result: (result.drop or 0.0, -preference.merit(result)))
    same = [result for result in calibrated if result.made.option.params == closest.made.option.params]
    base = max(same, key=preference.merit)
    holding = max((preference.merit(result) for result in usable if within_safely(result, guard)), default=0.0)
    return base if preference.merit(base) > holding else None


def _pays(
    given: Search, base: CandidateResult, results: Sequence[CandidateResult], noise: SensitivityReport
) -> Callable[[tuple[str, ...]], bool]:
    """Whether a set of layers in float could be better than a float candidate, by the time and bytes that they cost.

    The time is predicted from the share of the multiply-accumulates and the screened times of int8 and float32 on the
    engine. A scheme that was asked for by name has no float rival: it is searched to its end.
    """
    preference, guard = given.preference, given.request.max_quality_drop
    rivals = [a for a in alive(results) if is_float(a) and not a.reference and within(a, guard)]
    plain = [a for a in alive(results) if a.made.option.scheme == "fp32"]
    plain = [a for a in plain if a.made.option.runtime == base.made.option.runtime]
    best = max((preference.merit(result) for result in rivals), default=0.0)
    if not best or not base.speedup or given.program.path is None:
        return lambda _: True
    macs = count_program(given.program.path, repeat_to_size(given.loaded.evaluation, 1)).by_node
    whole = sum(macs.values()) or 1
    shares = {
        keep.name: (macs.get(entry.layer.node, 0) / whole, keep.size_bytes * (1 - 1 / FLOAT_BYTES))
        for keep, entry in zip(keepable(noise), noise.layers, strict=True)
    }
    whole_ms = 1 / base.speedup
    more_ms = max(0.0, 1 / plain[0].speedup - whole_ms) if plain and plain[0].speedup else 0.0
    size = base.made.size_bytes or 1

    def pays(kept: tuple[str, ...]) -> bool:
        share, more_bytes = (sum(shares[name][part] for name in kept) for part in (0, 1))
        speedup = 1 / (whole_ms + share * more_ms)
        return preference.merit_of(speedup, preference.baseline_bytes / (size + more_bytes)) >= WORTH_MIXING * best

    return pays


def simulate(params: Params, loaded: LoadedModel, program: Program, calibration: Samples) -> Simulation:
    """The program with a switch on every layer that these params quantize.

    Raises:
        TechniqueError: there is no program, it cannot be simulated, or no layer of it can.
    """
    if program.path is None:
        raise TechniqueError("no layer can be simulated", "the model has no program")
    threads = loaded.bench.threads
    simulation = build_simulation(program.path, calibration.batches, params, threads=threads)
    if not simulation.layers:
        raise TechniqueError("no layer can be simulated", "none reads a stored float32 weight")
    return simulation


def _ranking(
    params: Params, loaded: LoadedModel, program: Program, calibration: Samples, context: RunContext, limit_s: float
) -> tuple[SensitivityReport | None, Predict | None, str]:
    """The noise of each layer that these params quantize, and of all without some; or why it is not known."""
    context.progress("guard: measuring the noise of each layer", None)
    try:
        simulation = simulate(params, loaded, program, calibration)
        noise = measure_sensitivity(simulation, limit_s=limit_s)
    except OmgoptimError as error:  # a program that the simulation cannot take still has its candidates
        return None, None, f"{error.what}: {error.why}"
    nodes = {layer.name: entry.layer.node for layer, entry in zip(keepable(noise), noise.layers, strict=True)}

    def predict(kept: tuple[str, ...]) -> float:
        return float(10 ** (-simulation.sqnr(simulation.nodes - {nodes[name] for name in kept}) / 10))

    return noise, predict, ""


def keepable(noise: SensitivityReport) -> list[Keepable]:
    """The layers as the search knows them, each under a name that means it alone."""
    entries = [(entry, entry.layer) for entry in noise.layers]
    paths = Counter(layer.path for _, layer in entries)
    return [
        Keepable(_name(layer, [other for _, other in entries], paths), layer.path, layer.weight_bytes, entry.power)
        for entry, layer in entries
    ]


def _name(layer: OnnxLayer, others: Sequence[OnnxLayer], paths: Counter[str]) -> str:
    """A layer's path, or its node's name where the path would name others too."""
    plain = not set(layer.path) & set("*?[")
    alone = paths[layer.path] == 1 and not any(
        matches(layer.path, other.path) for other in others if other is not layer
    )
    return layer.path if plain and alone else layer.node


def keeping(option: Option, kept: Sequence[str]) -> Option:
    """The option with these layers in float as well."""
    if not kept:
        return option
    ignore = [*getattr(option.params, "ignore", []), *kept]
    return Option(
        option.params.model_copy(update={"ignore": ignore}), option.runtime, f"{count_words(len(kept))} in float"
    )


def _tell(tried: Sequence[CandidateResult], guard: float) -> None:
    """Why each of the search's candidates is not the artifact, unless it is timed and becomes one."""
    for result in tried:
        if result.error is not None:
            result.status, result.why = "failed", f"{result.error.what}: {result.error.why}".strip(": ")
        elif within(result, guard):
            result.why = "tried by the guard; fewer layers in float hold it too"
        else:
            result.why = f"tried by the guard: quality drop {result.drop:.4f} is above {guard:g}"


def _time_it(
    given: Search,
    trials: CandidateEvaluator,
    results: Sequence[CandidateResult],
    base: CandidateResult,
    best: CandidateResult,
) -> None:
    """Time the best set, on each engine that its plain sibling ran on, against that sibling: it starts faster than the
    original, whose time cancels out."""
    others = {
        result.made.option.runtime
        for result in results
        if result.timing and result.made.option.params == base.made.option.params
    }
    timed = [best]
    for runtime in sorted(others - {best.made.option.runtime}):
        if not trials.out_of_time():
            timed.append(trials.for_other_runtime(best, runtime))
    timed = [result for result in timed if result.made.folder and result.error is None]
    given.context.progress("guard: timing what it found", None)
    folders = [result.made.folder for result in (base, *timed) if result.made.folder]
    with given.context.measuring():
        timings = time_artifacts(folders, given.loaded.bench, SCREENING_PLAN, given.request.seed)
    for result, timing in zip(timed, timings[1:], strict=True):
        if isinstance(timing, Timing) and timing.speedup is not None:
            value = base.speedup * timing.speedup.value
            result.timing = replace(timing, speedup=Ratio(value, None, None))
        elif isinstance(timing, OmgoptimError):
            result.error = timing
