"""Post-training static quantization (PTQ): a pipeline of accuracy-preserving steps before the QDQ program is written.

The float program is rewritten first (cross-layer equalization, bias correction, weight rounding) and activation ranges
are observed. The QDQ program written from both is a standard one and runs at the speed of any other.

    first layers in float -> equalize channels, round small kernels -> select ranges -> correct biases -> AdaRound

The first layers stay in float where they are cheap: every later layer reads their quantization error, and integer
kernels are often no faster there, as three input channels do not fill a vector register.

A step is kept only if it raises the output SQNR of the quantized program on calibration samples that the step did not
see (a quarter of them, held out). Evaluation data plays no part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
from onnx import ModelProto

from omgoptim.models.onnx_file import initializers
from omgoptim.models.onnx_graph import OnnxLayer, find_layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.layer_weights import find_layer_weights
from omgoptim.techniques.quantize._onnx.program import has_free_batch
from omgoptim.techniques.quantize._onnx.qdq import nodes_by_name, write_qdq
from omgoptim.techniques.quantize._ptq.adaround import MAX_PASSES, apply_adaround, round_small_kernels
from omgoptim.techniques.quantize._ptq.bias_correction import MAX_PASSES as CORRECTIONS
from omgoptim.techniques.quantize._ptq.bias_correction import correct_biases
from omgoptim.techniques.quantize._ptq.calibration import Batch, outputs, size_of, split, subsample
from omgoptim.techniques.quantize._ptq.equalization import SHARES, channel_peaks, equalize_channels
from omgoptim.techniques.quantize._ptq.equalization_groups import find_groups
from omgoptim.techniques.quantize._ptq.observers import Method, compute_ranges, observe_activations, read_ranges
from omgoptim.techniques.quantize._ptq.state import (
    MIN_CHOICE_GAIN_DB,
    MIN_STEP_GAIN_DB,
    CalibrationSplit,
    PtqSettings,
    PtqState,
    PtqTask,
)
from omgoptim.techniques.quantize._ptq.step_cache import PtqResult, cache_result, cached_result
from omgoptim.text import plural

MAX_FLOAT_LAYERS = 3
"""Maximum number of first layers that may stay in float. Chosen: speed against noise."""

MAX_WORK_SHARE = 0.04
"""Maximum share of the chosen layers' MACs, and of their weights, that layers in float may have. Chosen: where int8 is
four times as fast, 4 % take 12 % more time."""

SHARES_TRIED: dict[bool, tuple[float, ...]] = {False: SHARES, True: (1.0, 0.75, 0.5)}
"""Values of `share` in `equalize_channels` that are tried without and with AdaRound. Chosen: each costs a calibration;
with AdaRound the preset allows one more."""

ROUNDED = ("small_kernels", "adaround")
"""Rounding methods that minimize the error of the layers' outputs."""

MIN_FLOAT_GAIN_DB = 1.0
"""Smallest SQNR gain for which first layers stay in float. Chosen: a fifth of the noise power for their time."""

COMPARISON_MACS = 5e10
"""Limit of the MACs of one comparison of equalized programs, for which a large network takes fewer samples. Chosen: 1.5
s at the rate of `RANGE_SEARCH_MACS`."""

MIN_COMPARISON_SAMPLES = 16
"""Minimum number of samples of such a run, whatever they cost. Chosen: with fewer an SQNR is chance."""

CORRECTION_MACS, ROUNDING_MACS = 1e12, 2e12
"""Limits of the multiply-accumulates of all runs of bias correction and of AdaRound: half a minute and a minute at the
rate of `RANGE_SEARCH_MACS`.
"""


def affordable_prefixes(model: ModelProto, chosen: Sequence[OnnxLayer]) -> Iterator[list[OnnxLayer]]:
    """Yield the first layer, the first two … in graph order, while their share of the work is small.

    Nothing for a program in which the size of an output is unknown.
    """
    order = {node.name: at for at, node in enumerate(model.graph.node)}
    ordered = sorted((layer for layer in chosen if layer.op != "Gather"), key=lambda layer: order[layer.node])
    work = {layer.node: _layer_macs(model, layer) for layer in ordered}
    if None in work.values():
        return
    macs, weights = (sum(one) for one in ([work[x.node] or 0 for x in ordered], [_weight_size(x) for x in ordered]))
    for count in range(1, min(MAX_FLOAT_LAYERS, len(ordered) - 1) + 1):
        first = ordered[:count]
        if sum(work[layer.node] or 0 for layer in first) > MAX_WORK_SHARE * macs:
            return
        if sum(map(_weight_size, first)) > MAX_WORK_SHARE * weights:
            return
        yield first


def multiply_accumulates(model: ModelProto, chosen: Sequence[OnnxLayer]) -> int | None:
    """Count the MACs of one sample in the chosen layers; None where an output size is unknown."""
    work = [_layer_macs(model, layer) for layer in chosen if layer.op != "Gather"]
    return None if None in work else sum(one or 0 for one in work)


def restore_float_layers(model: ModelProto, reference: ModelProto, kept: Collection[str]) -> ModelProto:
    """Return a copy of the program in which the layers of these nodes have the weights and biases of the reference."""
    copy = deepcopy(model)
    nodes, originals = nodes_by_name(copy), nodes_by_name(reference)
    tensors = initializers(copy)
    floats = initializers(reference)
    for node in kept:
        del nodes[node].input[:]  # a bias may have been added
        nodes[node].input.extend(originals[node].input)
        for name in originals[node].input:
            if name in floats and name in tensors:
                tensors[name].CopyFrom(floats[name])
    return copy


def _layer_macs(model: ModelProto, layer: OnnxLayer) -> int | None:
    """Count a layer's MACs of one sample; None where its output size is unknown."""
    if layer.op == "Gemm":
        return _weight_size(layer)
    node = next(node for node in model.graph.node if node.name == layer.node)
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    if node.output[0] not in known or layer.op not in ("Conv", "MatMul"):
        return None
    dims = known[node.output[0]].type.tensor_type.shape.dim
    places = dims[2:] if layer.op == "Conv" else dims[1:-1]
    if not all(dim.HasField("dim_value") for dim in places):
        return None
    return _weight_size(layer) * int(np.prod([dim.dim_value for dim in places]))


def _weight_size(layer: OnnxLayer) -> int:
    return int(np.prod(layer.shape))


def quantize(
    model: ModelProto, batches: Sequence[Batch], task: PtqTask, float_layers: list[OnnxLayer] | None = None
) -> tuple[ModelProto, list[str]]:
    """Return the QDQ program of a prepared float program, and what was done, a sentence each.

    Args:
        model: the prepared float program.
        batches: calibration inputs by name.
        task: layers, number format and threads.
        float_layers: takes the layers of the task that stay in float.
    """
    result = cached_result(task)
    if result is None:
        result = _ptq_result(model, batches, task)
        cache_result(result, task)
    chosen = [layer for layer in task.chosen if layer.node in result.quantized]
    if float_layers is not None:
        float_layers.extend(layer for layer in task.chosen if layer.node in result.left_out)
    program = result.model
    in_float = set(result.quantized) - {layer.node for layer in chosen}
    if in_float:
        program = restore_float_layers(program, result.reference, in_float)
    return write_qdq(program, chosen, result.ranges, task.params), list(result.notes)


def _ptq_result(model: ModelProto, batches: Sequence[Batch], task: PtqTask) -> PtqResult:
    params = task.params
    if not rewrites(params) and params.range_method != "auto":
        histogram = params.range_method not in ("minmax", "moving_average")
        observers = observe_activations(model, batches, histogram=histogram, threads=task.threads)
        ranges = compute_ranges(observers, params.range_method, params.symmetric)
        return PtqResult(model, model, ranges, [layer.node for layer in task.chosen], [], [])
    state, settings, notes = _run_steps(model, batches, task)
    in_float = _layers_in_float(task, settings)
    quantized, left_out = ([layer.node for layer in part] for part in (settings.chosen, in_float))
    return PtqResult(state.model, state.reference, state.ranges, quantized, left_out, notes)


def rewrites(params: Static) -> bool:
    """Return whether the pipeline changes the float program, beyond observing its ranges."""
    return bool(params.equalize or params.bias_correction or params.rounding in ROUNDED)


def rewrite(model: ModelProto, batches: Sequence[Batch], task: PtqTask) -> tuple[ModelProto, list[OnnxLayer]]:
    """Return the float program after every step, for another quantizer, and the layers that stay in float."""
    state, settings, _ = _run_steps(model, batches, task)
    return state.model, _layers_in_float(task, settings)


def _run_steps(model: ModelProto, batches: Sequence[Batch], task: PtqTask) -> tuple[PtqState, PtqSettings, list[str]]:
    """Run the steps; the settings returned have the layers that are quantized."""
    notes: list[str] = []
    settings = _prepare_settings(model, batches, task, notes)
    state = _initial_state(model, settings)
    state, settings = _keep_first_layers_in_float(state, settings, notes)
    state = _equalize(state, settings, notes)
    state = read_ranges(state, settings, notes)
    if task.params.bias_correction:
        state = _correct_biases(state, settings, notes)
    if task.params.rounding == "adaround":
        state = _apply_adaround(state, settings, notes)
    return state, settings, notes


def _layers_in_float(task: PtqTask, settings: PtqSettings) -> list[OnnxLayer]:
    quantized = {layer.node for layer in settings.chosen}
    return [layer for layer in task.chosen if layer.node not in quantized]


def equalize(model: ModelProto, batches: Sequence[Batch], task: PtqTask) -> tuple[ModelProto, list[str]]:
    """Return the float program after cross-layer equalization alone, for another quantizer, and what was done."""
    notes: list[str] = []
    settings = _prepare_settings(model, batches, task, notes)
    return _equalize(_initial_state(model, settings), settings, notes).model, notes


def _prepare_settings(model: ModelProto, batches: Sequence[Batch], task: PtqTask, notes: list[str]) -> PtqSettings:
    fit, held_out = split(batches, sliceable=has_free_batch(model))
    if fit[0] is held_out[0]:
        samples = plural(sum(map(size_of, held_out)), "sample")
        notes.append(f"PTQ was fitted and compared on the same {samples}: too few to hold some out.")
    return PtqSettings(
        *(task.chosen, task.params, task.threads, task.seed, task.progress),
        data=CalibrationSplit(fit, held_out, outputs(model, held_out, task.threads)),
        macs=multiply_accumulates(model, task.chosen),
    )


def _initial_state(model: ModelProto, settings: PtqSettings) -> PtqState:
    """Create the state of a program with ranges from the fitting samples and small kernels rounded if that helps."""
    method: Method = "minmax" if settings.params.range_method == "auto" else settings.params.range_method
    histogram = method not in ("minmax", "moving_average")
    fit = settings.data.fit
    subset = _subset(fit, settings.affordable_runs(COMPARISON_MACS, sum(map(size_of, fit))), model)
    observers = observe_activations(model, subset, histogram=histogram, threads=settings.threads)
    ranges = compute_ranges(observers, method, settings.params.symmetric)
    return _round_small_kernels(PtqState(model, ranges, settings.measure_sqnr(model, ranges), model), settings)


def _keep_first_layers_in_float(
    state: PtqState, settings: PtqSettings, notes: list[str]
) -> tuple[PtqState, PtqSettings]:
    """Leave the first layers in float where they are cheap and make most of the noise."""
    if settings.params.rounding not in ROUNDED or settings.params.targets:
        return state, settings
    best, kept = state, settings
    for first in affordable_prefixes(state.model, settings.chosen):
        nodes = {layer.node for layer in first}
        tried = replace(settings, chosen=[layer for layer in settings.chosen if layer.node not in nodes])
        found = tried.with_program(state, restore_float_layers(state.model, state.reference, nodes), state.ranges)
        if found.sqnr_db > best.sqnr_db + MIN_FLOAT_GAIN_DB:
            best, kept = found, tried
    count = len(settings.chosen) - len(kept.chosen)
    if count:
        layers = "The first layer" if count == 1 else f"The first {count} layers"
        notes.append(f"{layers} in float32 {_gain(state.sqnr_db, best.sqnr_db)}.")
    return best, kept


def _equalize(best: PtqState, settings: PtqSettings, notes: list[str]) -> PtqState:
    """Equalize channels if that raises the SQNR.

    Layers that stay in float take part: they compute the same, and their neighbours need the scaling all the more.
    """
    model = best.reference
    if not settings.params.equalize:
        _note_small_kernels(best, notes)
        return best
    before_db, scaled_groups, group_count = best.sqnr_db, 0, 0
    shares = (
        SHARES_TRIED[settings.params.rounding == "adaround"] if settings.params.granularity == "per_channel" else (1.0,)
    )
    groups = find_groups(model, find_layer_weights(model, find_layers(model)))
    peaks = channel_peaks(model, groups, settings.data.fit, settings.threads)
    for index, share in enumerate(shares):
        settings.progress("scaling channels", index / len(shares))
        scaled, group_count = equalize_channels(model, find_layers(model), settings.params, share, peaks)
        if group_count == 0:
            break
        state = _initial_state(scaled, settings)
        if state.sqnr_db > best.sqnr_db + MIN_CHOICE_GAIN_DB:
            best, scaled_groups = state, group_count
    if group_count == 0:
        notes.append("Cross-layer equalization found no layer groups.")
    elif not scaled_groups:
        notes.append("Cross-layer equalization did not raise the SQNR and was left out.")
    else:
        where = plural(scaled_groups, "layer group")
        notes.append(f"Cross-layer equalization on {where} {_gain(before_db, best.sqnr_db)}.")
    _note_small_kernels(best, notes)
    return best


def _round_small_kernels(state: PtqState, settings: PtqSettings) -> PtqState:
    """Round small kernels if that is requested and raises the SQNR."""
    if settings.params.rounding not in ROUNDED:
        return state
    found = round_small_kernels(state.model, state.ranges, settings.data.fit, settings)
    if not found.changed:
        return state
    rounded = replace(settings.with_program(state, found.model, state.ranges), rounded_kernels=len(found.changed))
    return rounded if rounded.sqnr_db > state.sqnr_db + MIN_STEP_GAIN_DB else state


def _note_small_kernels(state: PtqState, notes: list[str]) -> None:
    if state.rounded_kernels:
        notes.append(
            f"Small kernels of {plural(state.rounded_kernels, 'layer')} were rounded to minimize the output error."
        )


def _correct_biases(state: PtqState, settings: PtqSettings, notes: list[str]) -> PtqState:
    fit = settings.data.fit
    share = settings.affordable_runs(CORRECTION_MACS, sum(map(size_of, fit))) / CORRECTIONS
    subset = _subset(fit, share, state.model)
    model, count = correct_biases(state.model, state.reference, state.ranges, subset, settings)
    better = settings.with_program(state, model, state.ranges)
    if count == 0 or better.sqnr_db <= state.sqnr_db + MIN_STEP_GAIN_DB:
        notes.append("Bias correction did not raise the SQNR and was left out.")
        return state
    notes.append(f"Bias correction of {plural(count, 'layer')} {_gain(state.sqnr_db, better.sqnr_db)}.")
    return better


def _apply_adaround(state: PtqState, settings: PtqSettings, notes: list[str]) -> PtqState:
    data, runs = settings.data, 2 * MAX_PASSES
    samples = sum(map(size_of, [*data.fit, *data.held_out]))
    share = settings.affordable_runs(ROUNDING_MACS, samples) / runs
    fit, held_out = (_subset(part, share, state.model) for part in (data.fit, data.held_out))
    result = apply_adaround(state.model, state.reference, state.ranges, fit, held_out, settings)
    after = settings.with_program(state, result.model, state.ranges)
    if after.sqnr_db <= state.sqnr_db + MIN_STEP_GAIN_DB:
        notes.append("AdaRound did not raise the SQNR and was left out.")
        return state
    notes.append(f"AdaRound on {plural(len(result.changed), 'layer')} {_gain(state.sqnr_db, after.sqnr_db)}.")
    if result.unsupported:
        notes.append(f"AdaRound does not support {plural(len(result.unsupported), 'layer')}: too large or transposed.")
    return after


def _subset(batches: list[Batch], share: float, model: ModelProto) -> list[Batch]:
    """Take about that share of the samples, at least `MIN_COMPARISON_SAMPLES` where there are as many."""
    samples = sum(map(size_of, batches))
    count = max(MIN_COMPARISON_SAMPLES, share * samples)
    return batches if count >= samples else subsample(batches, round(count), sliceable=has_free_batch(model))


def _gain(before_db: float, after_db: float) -> str:
    return f"raised SQNR from {before_db:.1f} to {after_db:.1f} dB"
