"""Bias correction: remove the mean quantization error of each layer's output through its bias.

Rounding weights and clipping activations move the mean of a layer's output, and the next layers carry the shift on:

    b'_O = b_O + E[y_O] - E[y'_O],   y' the output with quantized weights on quantized inputs

Layers are corrected in graph order, a few at a time, each with those before it corrected already, so that a shift is
not taken back twice. Costs one run over the calibration data for every few layers.
Source: arXiv:1906.04721, 4.2; measured on data, where that paper also derives it from batch norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.techniques.quantize._onnx.layer_weights import LayerWeight, bias_of, find_layer_weights, set_bias
from omgoptim.techniques.quantize._onnx.qdq import Range, nodes_by_name, stored_weights, write_qdq
from omgoptim.techniques.quantize._ptq.calibration import ActivationReader, Batch
from omgoptim.techniques.quantize._ptq.state import PtqTask

MAX_PASSES = 24
"""Maximum number of passes over the data. Chosen by time: with more layers, neighbours share one."""


def correct_biases(
    model: ModelProto,
    reference: ModelProto,
    ranges: Mapping[str, Range],
    batches: Sequence[Batch],
    task: PtqTask,
) -> tuple[ModelProto, int]:
    """Return a copy of the float program with corrected biases, and the number of corrected layers.

    Args:
        model: the program that will be quantized with `ranges`.
        reference: the program whose means are the target: the same nodes with the weights before rounding.
        ranges: of the tensors, by name.
        batches: calibration inputs by name.
        task: layers, number format and threads.
    """
    result = deepcopy(model)
    simulated = write_qdq(model, task.chosen, ranges, task.params, float_biases=True)
    integers = stored_weights(simulated)
    layers = [
        layer
        for layer in find_layer_weights(result, task.chosen)
        if layer.name in integers and bias_of(result, layer) is not None
    ]
    nodes, reference_nodes = nodes_by_name(simulated), nodes_by_name(reference)
    tensors = {layer.name: reference_nodes[layer.name].output[0] for layer in layers}
    reference_means = output_means(reference, tensors, batches, task.threads)
    count = max(1, -(-len(layers) // MAX_PASSES))
    for start in range(0, len(layers), count):
        task.progress("correcting biases", start / len(layers))
        part = layers[start : start + count]
        means = output_means(
            simulated, {layer.name: nodes[layer.name].output[0] for layer in part}, batches, task.threads
        )
        for layer in part:
            _shift_bias(result, simulated, layer, reference_means[layer.name] - means[layer.name])
    return result, len(layers)


def output_means(
    model: ModelProto, tensors: Mapping[str, str], batches: Sequence[Batch], threads: int = 1
) -> dict[str, NDArray[np.float64]]:
    """Return the mean of named tensors over everything but the channels (axis 1), (O,) each, by the names' keys."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    if not tensors:
        return {}
    for _, values in ActivationReader(model, list(tensors.values()), exact=True, threads=threads).slices(batches):
        for name, tensor in tensors.items():
            array = values[tensor]
            total = array.sum(axis=tuple(axis for axis in range(array.ndim) if axis != 1), dtype=np.float64)
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + array.size // array.shape[1]
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def _shift_bias(result: ModelProto, simulated: ModelProto, layer: LayerWeight, shift_O: NDArray[np.float64]) -> None:
    bias = bias_of(result, layer)
    if bias is None:
        return
    new = (bias + shift_O).astype(np.float32)
    set_bias(result, layer.node, new)
    set_bias(simulated, nodes_by_name(simulated)[layer.name], new)
