"""Round the weights of a program layer by layer for the least output error (`adaround.py`).

Layers are rounded in graph order, each on the inputs that the rounded and bias-corrected layers before it give. The
result is a float program whose weights lie on the integer grid, so that rounding to nearest gives exactly the chosen
integers: the largest weight of a scale stays, and with it the scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.techniques.quantize._onnx.layer_weights import LayerWeight, bias_of, find_layer_weights, set_bias
from omgoptim.techniques.quantize._onnx.qdq import (
    Range,
    StoredWeight,
    nodes_by_name,
    set_integers,
    stored_weights,
    write_qdq,
)
from omgoptim.techniques.quantize._onnx.runtime import has_free_batch, weight_levels
from omgoptim.techniques.quantize._ptq.calibration import Batch, subsample
from omgoptim.techniques.quantize._ptq.patch_moments import MomentOptions, PatchMoments, collect_moments, is_readable
from omgoptim.techniques.quantize._ptq.state import PtqTask

MAX_PATCH = 4608
"""Maximum values of a patch for AdaRound: the second moments have the square of it."""

MAX_PASSES = 32
"""Maximum passes over the data. With more layers, neighbours share a pass; all but the first of them then account for
their own rounding only, since their quantized inputs are not known yet.
"""

SMALL_PATCH = 64
"""Values of a patch up to which a kernel counts as small: few rounding errors, which do not average out."""

SMALL_VALUES = 2**23
"""Patch values of a layer that are read for a small kernel: its few moments need no more."""

SMALL_SAMPLES = 64
"""Samples for the moments of a small kernel."""


@dataclass(frozen=True, slots=True)
class RoundingResult:
    """Program with rounded weights, and its layers."""

    model: ModelProto
    changed: list[str]
    """Node names of layers with a weight that is not rounded to nearest."""
    left: list[str]
    """Node names of layers that were left out: too large a patch, or an operator without patches."""


@dataclass(slots=True)
class RoundingTask:
    """Programs that are rounded together: float, its QDQ form if it is executed, and the float reference."""

    result: ModelProto
    simulated: ModelProto | None
    reference: ModelProto
    stored: Mapping[str, StoredWeight]
    biases: Mapping[str, NDArray[np.float32] | None]
    """Bias of the reference; None where the layer has none that can be changed."""


def apply_adaround(
    model: ModelProto,
    reference: ModelProto,
    ranges: Mapping[str, Range],
    fit: Sequence[Batch],
    held: Sequence[Batch],
    task: PtqTask,
) -> RoundingResult:
    """Round the weights of a copy of the float program by AdaRound, and correct its biases.

    Args:
        model: the program to round; its biases may be corrected already.
        reference: the float program with the weights and biases before any rounding.
        ranges: of the tensors, by name.
        fit: batches to learn the rounding on.
        held: batches to choose between the ways of rounding by.
        task: layers, number format and threads.
    """
    chosen, params = task.chosen, task.params
    result = ModelProto()
    result.CopyFrom(model)
    simulated = write_qdq(model, chosen, ranges, params, float_biases=True)
    stored = stored_weights(simulated)
    floats = {layer.name: layer for layer in find_layer_weights(reference, chosen)}
    biases = {name: bias_of(reference, layer) if params.bias_correction else None for name, layer in floats.items()}
    work = RoundingTask(result, simulated, reference, stored, biases)
    candidates = [layer for layer in find_layer_weights(result, chosen) if layer.name in stored]
    layers = [layer for layer in candidates if is_readable(layer) and _patch(layer) <= MAX_PATCH]
    count = max(1, -(-len(layers) // MAX_PASSES))
    integers: dict[str, NDArray[np.int32]] = {}
    for start in range(0, len(layers), count):
        task.progress("learning the rounding", start / len(layers))
        block = layers[start : start + count]
        units = {layer.name: floats[layer.name].read() / _scales(layer, stored[layer.name]) for layer in block}
        options = MomentOptions({layer.name for layer in block[1:]}, seed=task.seed, threads=task.threads)
        parts = [collect_moments(block, simulated, reference, units, batches, options) for batches in (fit, held)]
        for layer in block:
            integers[layer.name] = _round(work, layer, units[layer.name], parts[0][layer.name], parts[1][layer.name])
    moved = _restore_moved(write_qdq(result, chosen, ranges, params), layers, integers, floats)
    changed = [
        layer.name
        for layer in layers
        if layer.name not in moved and (layer.arrange(stored[layer.name].integers) != integers[layer.name]).any()
    ]
    return RoundingResult(result, changed, [layer.name for layer in candidates if layer.name not in integers])


def round_small_kernels(
    model: ModelProto,
    ranges: Mapping[str, Range],
    batches: Sequence[Batch],
    task: PtqTask,
) -> RoundingResult:
    """Round the small kernels of a copy of the float program for the least output error on float inputs.

    Costs one run over a few samples, whatever the number of layers. Depthwise and first convolutions need it most:
    their taps often cancel out, so that an error of the sum of nine weights is large beside what is left.
    """
    chosen, params = task.chosen, task.params
    result = ModelProto()
    result.CopyFrom(model)
    stored = stored_weights(write_qdq(model, chosen, ranges, params))
    layers = [
        layer
        for layer in find_layer_weights(result, chosen)
        if layer.name in stored and is_readable(layer) and _patch(layer) <= SMALL_PATCH
    ]
    floats = {layer.name: layer for layer in find_layer_weights(model, chosen)}
    biases = {layer.name: bias_of(model, layer) if params.bias_correction else None for layer in layers}
    work = RoundingTask(result, None, model, stored, biases)
    units = {layer.name: floats[layer.name].read() / _scales(layer, stored[layer.name]) for layer in layers}
    moments = collect_moments(
        *(layers, model, model, units, subsample(batches, SMALL_SAMPLES, sliceable=has_free_batch(model))),
        MomentOptions(set(units), exact=False, values=SMALL_VALUES, seed=task.seed, threads=task.threads),
    )
    integers = {
        layer.name: _round(work, layer, units[layer.name], moments[layer.name], moments[layer.name], steps=0)
        for layer in layers
    }
    moved = _restore_moved(write_qdq(result, chosen, ranges, params), layers, integers, floats)
    return RoundingResult(result, [name for name in integers if name not in moved], [])


def _round(
    work: RoundingTask,
    layer: LayerWeight,
    units: NDArray[np.float32],
    fit: PatchMoments,
    held: PatchMoments,
    steps: int | None = None,
) -> NDArray[np.int32]:
    """Round a layer and correct the mean error through its bias, in the float and the QDQ program."""
    from omgoptim.techniques.quantize._ptq.adaround import (
        STEPS,
        round_weights,  # imports torch
    )

    bias = work.biases[layer.name]
    w_GOK = units.reshape(*units.shape[:2], -1).astype(np.float64)
    found = round_weights(
        w_GOK, fit, held, highest=weight_levels(), centred=bias is not None, steps=STEPS if steps is None else steps
    )
    integers, scales = found.reshape(units.shape), _scales(layer, work.stored[layer.name])
    layer.write((integers * scales).astype(np.float32))
    if work.simulated is not None:
        set_integers(work.simulated, layer.name, layer.restore(integers).astype(np.int8))
    if bias is not None:
        shift = fit.shift(found.astype(np.float64)) * scales[:, :, 0, 0]
        new = (bias + shift.reshape(-1)).astype(np.float32)
        set_bias(work.result, layer.node, new)
        if work.simulated is not None:
            set_bias(work.simulated, nodes_by_name(work.simulated)[layer.name], new)
    return integers


def _restore_moved(
    lowered: ModelProto,
    layers: Sequence[LayerWeight],
    integers: Mapping[str, NDArray[np.int32]],
    floats: Mapping[str, LayerWeight],
) -> list[str]:
    """Restore layers' float weights where the writer stores other integers, because it moved their scale."""
    stored = stored_weights(lowered)
    moved = []
    for layer in layers:
        if not np.array_equal(layer.arrange(stored[layer.name].integers), integers[layer.name]):
            layer.write(floats[layer.name].read())
            moved.append(layer.name)
    return moved


def _patch(layer: LayerWeight) -> int:
    _, _, inputs, taps = layer.read().shape
    return int(inputs * taps)


def _scales(layer: LayerWeight, stored: StoredWeight) -> NDArray[np.float32]:
    """Return a layer's scales as (G, O, 1, 1): one per output channel, or the same for all."""
    whole = layer.arrange(np.broadcast_to(stored.scales, stored.integers.shape))
    return np.ascontiguousarray(whole[:, :, :1, :1])
