"""Mixed precision: find the few layers to keep in float where calibrated int8 fails the quality guard.

Layers are ranked by their simulated noise at the model's output (`_diagnostics/sensitivity.py`), so that only few sets
get a full evaluation, and `layer_search.py` selects them. An evaluation is a candidate like any other: built, saved,
opened in the measuring process of its engine and run on the selection samples. The result is measured in a fresh
process, as every finalist is.

Where many layers would have to stay in float, or no set passes the guard, all weights are rounded by AdaRound, which
effort `best` does from the start, and the search begins again from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.program_macs import count_program
from omgoptim.measure.timing import SCREENING_PLAN, Ratio, Timing, time_artifacts
from omgoptim.models.samples import repeat_to_size
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidate_evaluator import CALIBRATED, CandidateEvaluator, Evaluators
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.layer_search import (
    EvaluatedSet,
    LayerSearchResult,
    LayerSets,
    SearchLayer,
    costs,
    is_better,
    search,
    search_layers_of,
)
from omgoptim.operations.quantization.mixed_precision_report import SearchOutcome, mixed_precision_record
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, within, within_with_margin
from omgoptim.operations.quantization.selection import (
    MIXED_PRECISION_FACTOR,
    NEAR_BEST_FACTOR,
    Preference,
    alive,
    is_float,
)
from omgoptim.operations.verdict import holds
from omgoptim.reports import Guard
from omgoptim.requests import Params, QuantizeRequest
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._diagnostics.sensitivity import SensitivityReport, measure_sensitivity
from omgoptim.techniques.quantize._diagnostics.simulation import Simulation, build_simulation
from omgoptim.techniques.quantize._ptq.state import apply_preset
from omgoptim.text import plural

RANKING_SHARE = 1 / 3
"""Share of the search's time limit for ranking the layers; the rest is for evaluations. Chosen: the evaluations
decide."""

MAX_FLOAT_SHARE = 0.25
"""Share of the layers in float above which AdaRound is tried. Chosen: with more in float, speed and size are near those
of a float program, and AdaRound costs neither."""

Predict = Callable[[tuple[str, ...]], float]
"""Noise-to-signal power ratio at the output with the layers of these names in float."""

FLOAT_BYTES = 4
"""Bytes of a float32 weight; its int8 form takes one."""


@dataclass(frozen=True, slots=True)
class MixedPrecision:
    """Result of a mixed precision search."""

    record: Guard

    base: CandidateResult
    """Initial candidate, with all layers quantized."""
    best: CandidateResult
    """Best candidate; `base` if nothing better was found."""
    known: dict[str, CandidateResult]
    """Evaluated candidates: `CandidateEvaluator.known`."""
    screening: ScreeningReference
    """Samples of the evaluation."""

    @property
    def improved(self) -> bool:
        """Return whether the search found something better than the initial candidate."""
        return self.best is not self.base


@dataclass(frozen=True, slots=True)
class MixedPrecisionSearch:
    """Inputs of a mixed precision search."""

    request: QuantizeRequest
    builder: CandidateBuilder
    screening: ScreeningReference
    """Samples for evaluation, and the original's outputs for them."""
    preference: Preference
    samples_name: str = "selection samples"
    """Name of these samples in sentences."""


def search_mixed_precision(
    given: MixedPrecisionSearch,
    results: list[CandidateResult],
    base: CandidateResult | None,
) -> MixedPrecision | None:
    """Search for the layers to keep in float.

    Evaluated candidates are added to `results`. The best one is timed on every engine that `base` was timed on.

    Args:
        given: model, samples and settings.
        results: the run's candidates so far.
        base: candidate without layers in float to start from, evaluated on these samples: see `mixed_precision_base`.


    Returns:
        The result; None where there is nothing to search.
    """
    request, loaded, program = given.request, given.builder.loaded, given.builder.program
    if base is None or base.drop is None or base.built.folder is None or program.path is None:
        return None
    start, guard = time.monotonic(), request.max_quality_drop
    with Evaluators(loaded.bench) as evaluators:
        evaluators.begin(base.built.folder, base.built.spec.runtime)  # starts while the layers are ranked
        names, deadline = {result.name for result in results}, start + request.guard_time_s
        trials = CandidateEvaluator(evaluators, given.builder, given.screening, deadline, reserved_names=names)
        limit_s = request.guard_time_s * RANKING_SHARE
        params = base.built.spec.params
        noise, predict, unknown = _ranking(params, given.builder, limit_s)
        worthwhile = _worthwhile(given, base, results, noise) if noise else (lambda _: True)
        searcher = Searcher(trials, guard, search_layers_of(noise) if noise else [], predict, worthwhile)
        found, best, rounded = searcher.search(base)
        _note_reasons(trials.results, guard, best)
        if best is not base:
            _time_best(given, trials, results, base, best)
    results.extend(trials.results)
    seconds = time.monotonic() - start
    ended = SearchOutcome(
        request, found, searcher.layers, noise, unknown, base, best, trials.evaluations, seconds, rounded
    )
    record = mixed_precision_record(ended, given.screening.samples, given.samples_name)
    return MixedPrecision(record, base, best, trials.known, given.screening)


@dataclass(frozen=True, slots=True)
class Searcher:
    """Searches for layers from one candidate, or from two with different rounding."""

    trials: CandidateEvaluator
    guard: float
    layers: list[SearchLayer]
    predict: Predict | None
    worthwhile: Callable[[tuple[str, ...]], bool]

    def search(self, base: CandidateResult) -> tuple[LayerSearchResult, CandidateResult, CandidateResult | None]:
        """Search from `base`, and from its form with AdaRound where that leaves too many layers in float.

        Returns:
            The better search, its best candidate, and the form with AdaRound if it was tried.
        """
        found = self._layers_from(base)
        rounded = self._with_adaround(base) if self._is_poor(found) else None
        if rounded is None or not rounded.cautious_drop(self.guard) < base.cautious_drop(self.guard):
            return found, self._candidate(base, found), rounded
        other = self._layers_from(rounded)
        if is_better(other.best, found.best, self.guard, holds, costs(self.layers)):
            return other, self._candidate(rounded, other), rounded
        return found, self._candidate(base, found), rounded

    def _layers_from(self, start: CandidateResult) -> LayerSearchResult:
        drop = start.cautious_drop(self.guard)
        if holds(drop, self.guard):
            return LayerSearchResult(EvaluatedSet((), drop))

        def evaluate(kept: tuple[str, ...]) -> float:
            doing = f"mixed precision: {plural(len(kept), 'layer')} in float"
            return self.trials.of(with_float_layers(start.built.spec, kept), doing).cautious_drop(self.guard)

        sets = LayerSets(evaluate, self.trials.out_of_time, self.predict, self.worthwhile)
        return search(self.layers, drop, self.guard, sets, holds)

    def _is_poor(self, found: LayerSearchResult) -> bool:
        return not holds(found.best.drop, self.guard) or len(found.best.kept) > MAX_FLOAT_SHARE * len(self.layers)

    def _with_adaround(self, base: CandidateResult) -> CandidateResult | None:
        """Evaluate the candidate with AdaRound; None where it has it already, cannot have it, or there is no time."""
        params = base.built.spec.params
        if not isinstance(params, Static) or params.algorithm != "onnxruntime" or self.trials.out_of_time():
            return None
        if apply_preset(params, "balanced").rounding != "small_kernels":
            return None
        spec = replace(base.built.spec, params=params.model_copy(update={"rounding": "adaround"}), note="AdaRound")
        longest_s = self.trials.longest_s
        result = self.trials.of(spec, "mixed precision: AdaRound")
        self.trials.longest_s = longest_s  # later programs take its steps
        return result

    def _candidate(self, start: CandidateResult, found: LayerSearchResult) -> CandidateResult:
        kept = found.best.kept
        return self.trials.of(with_float_layers(start.built.spec, kept), "mixed precision") if kept else start


def mixed_precision_base(
    results: Sequence[CandidateResult], guard: float, preference: Preference
) -> CandidateResult | None:
    """Return the calibrated candidate to start from: the program with the smallest loss, on its best engine.

    Engines round differently: of those near the best by preference, the one with the smallest loss.
    None if a calibrated candidate passes the guard with a margin, or if another that does is as good: layers in float
    only make it slower and larger.
    """
    usable = [result for result in alive(results) if not result.reference]
    calibrated = [result for result in usable if result.built.spec.scheme in CALIBRATED]
    if not calibrated or any(within_with_margin(result, guard) for result in calibrated):
        return None
    closest = min(calibrated, key=lambda result: (result.drop or 0.0, -preference.merit(result)))
    same = [result for result in calibrated if result.built.spec.params == closest.built.spec.params]
    most = max(map(preference.merit, same))
    near = [result for result in same if preference.merit(result) * NEAR_BEST_FACTOR >= most]
    base = min(near, key=lambda result: (result.drop or 0.0, -preference.merit(result)))
    holding = max((preference.merit(result) for result in usable if within_with_margin(result, guard)), default=0.0)
    return base if preference.merit(base) > holding else None


def _worthwhile(
    given: MixedPrecisionSearch, base: CandidateResult, results: Sequence[CandidateResult], noise: SensitivityReport
) -> Callable[[tuple[str, ...]], bool]:
    """Return a predicate: can a set of layers in float be better than a float candidate, by time and bytes?

    The time is predicted from the share of the multiply-accumulates and the screened times of int8 and float32 on the
    engine. A scheme requested by name has no float rival and is searched completely.
    """
    preference, guard = given.preference, given.request.max_quality_drop
    rivals = [a for a in alive(results) if is_float(a) and not a.reference and within(a, guard)]
    plain = [a for a in alive(results) if a.built.spec.scheme == "fp32"]
    plain = [a for a in plain if a.built.spec.runtime == base.built.spec.runtime]
    best = max((preference.merit(result) for result in rivals), default=0.0)
    if not best or not base.speedup or given.builder.program.path is None:
        return lambda _: True
    macs = count_program(given.builder.program.path, repeat_to_size(given.builder.loaded.evaluation, 1)).by_node
    whole = sum(macs.values()) or 1
    shares = {
        layer.name: (macs.get(entry.layer.node, 0) / whole, layer.size_bytes * (1 - 1 / FLOAT_BYTES))
        for layer, entry in zip(search_layers_of(noise), noise.layers, strict=True)
    }
    whole_ms = 1 / base.speedup
    more_ms = max(0.0, 1 / plain[0].speedup - whole_ms) if plain and plain[0].speedup else 0.0
    size = base.built.size_bytes or 1

    def worthwhile(kept: tuple[str, ...]) -> bool:
        share, more_bytes = (sum(shares[name][part] for name in kept) for part in (0, 1))
        speedup = 1 / (whole_ms + share * more_ms)
        return (
            preference.merit_of(speedup, preference.baseline_bytes / (size + more_bytes))
            >= MIXED_PRECISION_FACTOR * best
        )

    return worthwhile


def simulate(params: Params, builder: CandidateBuilder) -> Simulation:
    """Build a simulation with a switch for every layer that these params quantize.

    Raises:
        TechniqueError: there is no program, it cannot be simulated, or no layer of it can.
    """
    program = builder.program.path
    if program is None:
        raise TechniqueError("no layer can be simulated", "the model has no program")
    threads = builder.loaded.bench.threads
    simulation = build_simulation(program, builder.calibration.batches, params, threads=threads)
    if not simulation.layers:
        raise TechniqueError("no layer can be simulated", "no layer has a stored float32 weight")
    return simulation


def _ranking(
    params: Params, builder: CandidateBuilder, limit_s: float
) -> tuple[SensitivityReport | None, Predict | None, str]:
    """Measure the noise of each layer and of sets of layers; or return the reason why it is unknown."""
    builder.context.progress("mixed precision: measuring the noise of each layer", None)
    try:
        simulation = simulate(params, builder)
        noise = measure_sensitivity(simulation, limit_s=limit_s)
    except OmgoptimError as error:  # a program that the simulation cannot take still has its candidates
        return None, None, error.reason
    nodes = {layer.name: entry.layer.node for layer, entry in zip(search_layers_of(noise), noise.layers, strict=True)}

    def predict(kept: tuple[str, ...]) -> float:
        return float(10 ** (-simulation.sqnr(simulation.nodes - {nodes[name] for name in kept}) / 10))

    return noise, predict, ""


def with_float_layers(spec: CandidateSpec, kept: Sequence[str]) -> CandidateSpec:
    """Return the spec with additional layers in float."""
    if not kept:
        return spec
    ignore = [*getattr(spec.params, "ignore", []), *kept]
    params, count = spec.params.model_copy(update={"ignore": ignore}), len(kept)
    note = ", ".join(filter(None, (spec.note, f"{plural(count, 'layer')} in float")))
    return CandidateSpec(params, spec.runtime, note, count)


def _note_reasons(evaluated: Sequence[CandidateResult], guard: float, best: CandidateResult) -> None:
    """Record the reason for the status of each candidate of the search, but for the best one."""
    for result in evaluated:
        if result.error is not None:
            result.status, result.why = "failed", result.error.reason
        elif result is best:
            continue
        elif within(result, guard):
            result.why = "evaluated by the mixed precision search, which selected another set of layers"
        else:
            result.why = f"evaluated by the mixed precision search: quality drop {result.drop:.4f} is above {guard:g}"


def _time_best(
    given: MixedPrecisionSearch,
    trials: CandidateEvaluator,
    results: Sequence[CandidateResult],
    base: CandidateResult,
    best: CandidateResult,
) -> None:
    """Time the best set on each engine that `base` ran on, relative to `base`, which opens faster than the original."""
    others = {
        result.built.spec.runtime
        for result in results
        if result.timing and result.built.spec.params == base.built.spec.params
    }
    timed = [best]
    for runtime in sorted(others - {best.built.spec.runtime}):
        if not trials.out_of_time():
            timed.append(trials.for_other_runtime(best, runtime))
    timed = [result for result in timed if result.built.folder and result.error is None]
    given.builder.context.progress("mixed precision: timing the result", None)
    folders = [result.built.folder for result in (base, *timed) if result.built.folder]
    with given.builder.context.measuring():
        timings = time_artifacts(folders, given.builder.loaded.bench, SCREENING_PLAN, given.request.seed)
    for result, timing in zip(timed, timings[1:], strict=True):
        if isinstance(timing, Timing) and timing.speedup is not None:
            value = base.speedup * timing.speedup.value
            result.timing = replace(timing, speedup=Ratio(value, None, None))
        elif isinstance(timing, OmgoptimError):
            result.error = timing
