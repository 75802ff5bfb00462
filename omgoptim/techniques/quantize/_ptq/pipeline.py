"""Post-training static quantization (PTQ): a pipeline of accuracy-preserving steps before the QDQ program is written.

The float program is rewritten first (cross-layer equalization, bias correction, weight rounding) and activation ranges
are observed. The QDQ program written from both is a standard one and runs at the speed of any other.

    first layers in float -> equalize channels, round small kernels -> select ranges -> correct biases -> AdaRound

A step is kept only if it raises the output SQNR of the quantized program on calibration samples that the step did not
see (a quarter of them, held out). Evaluation data plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from onnx import ModelProto

from omgoptim.models.onnx_graph import Layer, layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.layer_weights import weighted_layers
from omgoptim.techniques.quantize._onnx.qdq import lower
from omgoptim.techniques.quantize._onnx.runtime import has_free_batch
from omgoptim.techniques.quantize._ptq.bias_correction import MOST_RUNS as CORRECTIONS
from omgoptim.techniques.quantize._ptq.bias_correction import corrected
from omgoptim.techniques.quantize._ptq.calibration import Batch, evenly, outputs, size_of, split
from omgoptim.techniques.quantize._ptq.equalization import SHARES, channel_peaks, equalized
from omgoptim.techniques.quantize._ptq.equalization_groups import groups
from omgoptim.techniques.quantize._ptq.float_prefix import cheap_prefixes, multiply_accumulates, restored
from omgoptim.techniques.quantize._ptq.observers import Method, observe, ranges_of
from omgoptim.techniques.quantize._ptq.range_selection import read_ranges
from omgoptim.techniques.quantize._ptq.state import BARELY_DB, CLEARLY_DB, Data, Settings, State
from omgoptim.techniques.quantize._ptq.weight_rounding import (
    MOST_RUNS,
    with_learned_rounding,
    with_small_kernels_rounded,
)

SHARES_TRIED: dict[bool, tuple[float, ...]] = {False: SHARES, True: (1.0, 0.75, 0.5)}
"""Of `equalized`, to be tried without and with a learned rounding."""


ROUNDED = ("small_kernels", "adaround")
"""Roundings that look at the layers' outputs."""


MUCH_DB = 1.0
"""What a layer that stays in float must gain."""


BEGINNING_MACS = 5e10
"""Multiply-accumulates of a run that scaled channels are judged by: of a large network it takes fewer samples."""


FEWEST_SAMPLES = 16
"""Read whatever they cost."""


CORRECTING_MACS, ROUNDING_MACS = 1e12, 2e12
"""The same of all runs that biases are corrected by, and that learned rounding reads inputs from."""


def quantize(
    model: ModelProto,
    chosen: Sequence[Layer],
    batches: Sequence[Batch],
    params: Static,
    *,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None,
    kept: list[Layer] | None = None,
) -> tuple[ModelProto, list[str]]:
    """Return the QDQ program of a prepared float program, and what was chosen, a sentence each.

    Args:
        params: resolved, see `presets.py`.
        kept: takes the chosen layers that stay in float.
    """
    plain = not (params.equalize or params.bias_correction or params.rounding in ROUNDED)
    if plain and params.range_method != "auto":
        histogram = params.range_method not in ("minmax", "moving_average")
        observed = observe(model, batches, histogram=histogram, threads=threads)
        return lower(model, chosen, ranges_of(observed, params.range_method, params.symmetric), params), []
    notes: list[str] = []
    settings = _settings(model, chosen, batches, params, threads, seed, progress, notes)
    state = _begin(model, settings)
    state, settings = _keep_first(state, settings, notes)
    if kept is not None:
        taken = {layer.node for layer in settings.chosen}
        kept.extend(layer for layer in chosen if layer.node not in taken)
    state = _equalize(state, settings, notes)
    state = read_ranges(state, settings, notes)
    if params.bias_correction:
        state = _correct(state, settings, notes)
    if params.rounding == "adaround":
        state = _round(state, settings, notes)
    return lower(state.model, settings.chosen, state.ranges, params), notes


def scaled(
    model: ModelProto,
    chosen: Sequence[Layer],
    batches: Sequence[Batch],
    params: Static,
    *,
    threads: int = 1,
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None,
) -> tuple[ModelProto, list[str]]:
    """The first step alone, for another quantizer: the float program with its channels scaled, if that helps ours."""
    notes: list[str] = []
    settings = _settings(model, chosen, batches, params, threads, 0, progress, notes)
    return _equalize(_begin(model, settings), settings, notes).model, notes


def _settings(
    model: ModelProto,
    chosen: Sequence[Layer],
    batches: Sequence[Batch],
    params: Static,
    threads: int,
    seed: int,
    progress: Callable[[str, float | None], None],
    notes: list[str],
) -> Settings:
    fit, held = split(batches, sliceable=has_free_batch(model))
    if fit[0] is held[0]:
        count = sum(map(size_of, held))
        plural = "" if count == 1 else "s"
        notes.append(f"Chosen on the {count} sample{plural} that it was fitted to: there were no others.")
    return Settings(
        chosen,
        params,
        Data(fit, held, outputs(model, held, threads)),
        threads,
        seed,
        progress,
        multiply_accumulates(model, chosen),
    )


def _begin(model: ModelProto, settings: Settings) -> State:
    """The program by ranges read from the samples to fit to, its small kernels rounded if that helps."""
    method: Method = "minmax" if settings.params.range_method == "auto" else settings.params.range_method
    histogram = method not in ("minmax", "moving_average")
    observed = observe(model, _beginning(settings, model), histogram=histogram, threads=settings.threads)
    ranges = ranges_of(observed, method, settings.params.symmetric)
    return _round_small_kernels(State(model, ranges, settings.level(model, ranges), model), settings)


def _keep_first(state: State, settings: Settings, notes: list[str]) -> tuple[State, Settings]:
    """Leave the first layers in float where they cost next to nothing there and most of the noise is theirs."""
    if settings.params.rounding not in ROUNDED or settings.params.targets:
        return state, settings
    best, kept = state, settings
    for first in cheap_prefixes(state.model, settings.chosen):
        nodes = {layer.node for layer in first}
        tried = replace(settings, chosen=[layer for layer in settings.chosen if layer.node not in nodes])
        found = tried.after(state, restored(state.model, state.reference, first), state.ranges)
        if found.sqnr_db > best.sqnr_db + MUCH_DB:
            best, kept = found, tried
    count = len(settings.chosen) - len(kept.chosen)
    if count:
        layers = "The first layer stays" if count == 1 else f"The first {count} layers stay"
        notes.append(f"{layers} in float ({state.sqnr_db:.1f} -> {best.sqnr_db:.1f} dB).")
    return best, kept


def _equalize(best: State, settings: Settings, notes: list[str]) -> State:
    """The program as it is, or with channels scaled, whichever quantizes better by ranges read alike.

    Layers that stay in float take part: they compute the same, and their neighbours need the scaling all the more.
    """
    model = best.reference
    if not settings.params.equalize:
        _note_small_kernels(best, notes)
        return best
    plain, count, places = best.sqnr_db, 0, 0
    shares = (
        SHARES_TRIED[settings.params.rounding == "adaround"] if settings.params.granularity == "per_channel" else (1.0,)
    )
    sets = groups(model, weighted_layers(model, layers(model)))
    peaks = channel_peaks(model, sets, settings.data.fit, settings.threads)
    for index, share in enumerate(shares):
        settings.progress("scaling channels", index / len(shares))
        scaled, places = equalized(model, layers(model), settings.params, share, peaks)
        if places == 0:
            break
        state = _begin(scaled, settings)
        if state.sqnr_db > best.sqnr_db + CLEARLY_DB:
            best, count = state, places
    if places == 0:
        notes.append("No channels could be scaled.")
    elif not count:
        notes.append("Scaling channels brought nothing and was left out.")
    else:
        notes.append(f"Channels scaled between layers in {count} places ({plain:.1f} -> {best.sqnr_db:.1f} dB).")
    _note_small_kernels(best, notes)
    return best


def _round_small_kernels(state: State, settings: Settings) -> State:
    """The small kernels rounded for their outputs, where that is wanted and brings the outputs closer."""
    if settings.params.rounding not in ROUNDED:
        return state
    found = with_small_kernels_rounded(
        *(state.model, settings.chosen, state.ranges, settings.params, settings.data.fit),
        seed=settings.seed,
        threads=settings.threads,
    )
    if not found.changed:
        return state
    rounded = replace(settings.after(state, found.model, state.ranges), rounded=len(found.changed))
    return rounded if rounded.sqnr_db > state.sqnr_db + BARELY_DB else state


def _note_small_kernels(state: State, notes: list[str]) -> None:
    if state.rounded:
        layers = "1 layer" if state.rounded == 1 else f"{state.rounded} layers"
        notes.append(f"Small kernels of {layers} rounded for their outputs.")


def _correct(state: State, settings: Settings, notes: list[str]) -> State:
    fit = settings.data.fit
    share = settings.evaluations(CORRECTING_MACS, sum(map(size_of, fit))) / CORRECTIONS
    model, count = corrected(
        state.model,
        state.reference,
        settings.chosen,
        state.ranges,
        settings.params,
        _some(fit, share, state.model),
        threads=settings.threads,
        progress=settings.progress,
    )
    better = settings.after(state, model, state.ranges)
    if count == 0 or better.sqnr_db <= state.sqnr_db + BARELY_DB:
        notes.append("Bias correction brought nothing and was left out.")
        return state
    notes.append(f"Biases of {count} layers corrected ({state.sqnr_db:.1f} -> {better.sqnr_db:.1f} dB).")
    return better


def _round(state: State, settings: Settings, notes: list[str]) -> State:
    data, runs = settings.data, 2 * MOST_RUNS
    samples = sum(map(size_of, [*data.fit, *data.held]))
    share = settings.evaluations(ROUNDING_MACS, samples) / runs
    fit, held = (_some(part, share, state.model) for part in (data.fit, data.held))
    found = with_learned_rounding(
        state.model,
        state.reference,
        settings.chosen,
        state.ranges,
        settings.params,
        fit,
        held,
        seed=settings.seed,
        threads=settings.threads,
        progress=settings.progress,
    )
    after = settings.after(state, found.model, state.ranges)
    if after.sqnr_db <= state.sqnr_db + BARELY_DB:
        notes.append("Learned rounding brought nothing and was left out.")
        return state
    left = f"; {len(found.left)} stay rounded to nearest, too large or transposed" if found.left else ""
    change = f"{state.sqnr_db:.1f} -> {after.sqnr_db:.1f} dB"
    notes.append(f"Rounding learned in {len(found.changed)} layers ({change}){left}.")
    return after


def _beginning(settings: Settings, model: ModelProto) -> list[Batch]:
    fit = settings.data.fit
    return _some(fit, settings.evaluations(BEGINNING_MACS, sum(map(size_of, fit))), model)


def _some(batches: list[Batch], share: float, model: ModelProto) -> list[Batch]:
    """About that share of the samples, at least `FEWEST_SAMPLES` where there are as many."""
    samples = sum(map(size_of, batches))
    wanted = max(FEWEST_SAMPLES, share * samples)
    return batches if wanted >= samples else evenly(batches, round(wanted), sliceable=has_free_batch(model))
