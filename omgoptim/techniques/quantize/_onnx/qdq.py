"""Write QDQ programs from float programs and activation ranges, by ONNX Runtime's quantizer.

ONNX Runtime's quantizer decides which tensors get quantizers and which share one, as its kernels need.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from omgoptim.models.onnx_file import attribute, initializers, set_values
from omgoptim.models.onnx_graph import OnnxLayer, find_layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.layer_weights import OPS
from omgoptim.techniques.quantize._onnx.program import as_technique_error, lacks_int8_dot_product, quiet_stdout

Range = tuple[float, float]
"""Lowest and highest value of an activation; values outside are clipped."""

CONCAT_RATIO = 4.0
"""Ratio of ranges above which one scale for both is avoided. Chosen: at 4 it costs the smaller one two bits."""


def write_qdq(
    model: ModelProto,
    chosen: Sequence[OnnxLayer],
    ranges: Mapping[str, Range],
    params: Static,
    *,
    float_biases: bool = False,
) -> ModelProto:
    """Write the QDQ program of a prepared float program, which is not changed.

    Args:
        model: prepared by `preparation.prepare`.
        chosen: the layers to quantize, with what lies between them; embeddings are left to `embeddings.py`.
        ranges: of every float tensor that is computed or given.
        params: granularity and symmetry.
        float_biases: whether biases stay float initializers under their own names, to be looked at and changed;
            otherwise they are int32, whose rounding is negligible.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    taken = {layer.node for layer in chosen if layer.op != "Gather"}
    excluded = [layer.node for layer in find_layers(model) if layer.node not in taken]
    excluded += float_tail(model, ranges)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    copy = deepcopy(model)
    with as_technique_error("ONNX Runtime could not quantize the program"), quiet_stdout(), _quiet_log():
        quantizer = QDQQuantizer(
            copy,
            params.granularity == "per_channel",
            lacks_int8_dot_product(),
            QuantType.QInt8,
            QuantType.QInt8 if params.symmetric else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            excluded,
            list({*QLinearOpsRegistry, *QDQRegistry}),
            {
                "ActivationSymmetric": params.symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": not float_biases,
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantized: ModelProto = quantizer.model.model
    return quantized


def float_tail(model: ModelProto, ranges: Mapping[str, Range]) -> list[str]:
    """Return the nodes after the last layers if they concatenate tensors of very different ranges; else none.

    A quantized Concat gives all its inputs one scale: beside boxes in pixels, scores in 0..1 would all be zero. Before
    another layer its input has one scale anyway.

    Args:
        model: the float program, its nodes in order.
        ranges: of its float tensors.
    """
    read: set[str] = set()  # by a layer, directly or not
    tail = []
    for node in reversed(model.graph.node):
        if node.op_type in OPS or read.intersection(node.output):
            read.update(node.input)
        else:
            tail.append(node)
    for node in tail:
        widths = [high - low for low, high in (ranges[name] for name in node.input if name in ranges)]
        if node.op_type == "Concat" and widths and max(widths) > CONCAT_RATIO * min(widths):
            return [late.name for late in tail]
    return []


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Silence ONNX Runtime's quantizer, which warns on the root logger about every vector that is not a weight."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Int8 weight of a layer in a QDQ program, with its scale."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    """Scale, in a shape that broadcasts to the weight's."""

    @property
    def values(self) -> NDArray[np.float32]:
        """Return the dequantized weight q * s, in the weight's own shape."""
        return (self.integers * self.scales).astype(np.float32)


def stored_weights(quantized: ModelProto) -> dict[str, StoredWeight]:
    """Return the int8 weights of a QDQ program by node name."""
    tensors = initializers(quantized)
    producers = {name: node for node in quantized.graph.node for name in node.output}
    found = {}
    for node in quantized.graph.node:
        producer = producers.get(node.input[1]) if len(node.input) > 1 else None
        if producer is None or producer.op_type != "DequantizeLinear" or producer.input[0] not in tensors:
            continue
        integers = numpy_helper.to_array(tensors[producer.input[0]])
        scales = numpy_helper.to_array(tensors[producer.input[1]])
        if integers.dtype != np.int8 or integers.ndim < 2:
            continue
        if scales.size > 1:
            axis = attribute(producer, "axis", 1)
            scales = scales.reshape([-1 if i == axis % integers.ndim else 1 for i in range(integers.ndim)])
        found[node.name] = StoredWeight(integers, scales.astype(np.float32))
    return found


def set_integers(quantized: ModelProto, node: str, integers: NDArray[np.int8]) -> None:
    """Replace the integers of a node's weight in a QDQ program, in place; the scale stays."""
    producers = {name: maker for maker in quantized.graph.node for name in maker.output}
    name = producers[nodes_by_name(quantized)[node].input[1]].input[0]
    set_values(initializers(quantized)[name], integers)


def nodes_by_name(model: ModelProto) -> dict[str, NodeProto]:
    """Return the nodes by name."""
    return {node.name: node for node in model.graph.node}


def activation_parameters(quantized: ModelProto) -> dict[str, tuple[str, str]]:
    """Return the names of each activation's scale and zero point in a QDQ program, by float tensor name.

    The writer names both after the tensor whose range they hold; tensors that share them are not listed.
    """
    tensors = {tensor.name for tensor in quantized.graph.initializer}
    found: dict[str, tuple[str, str]] = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) == 3 and node.input[0] not in tensors:
            scale, zero = node.input[1], node.input[2]
            if scale.endswith("_scale") and scale in tensors and zero in tensors:
                found[scale.removesuffix("_scale")] = (scale, zero)
    return found


def set_scale(quantized: ModelProto, names: tuple[str, str], bounds: Range, symmetric: bool) -> None:
    """Set an activation's range in a QDQ program, in place: s and z as the writer computes them."""
    tensors = initializers(quantized)
    for name, value in zip(names, quantization_parameters(bounds, symmetric), strict=True):
        set_values(tensors[name], np.full_like(numpy_helper.to_array(tensors[name]), value))


def quantization_parameters(bounds: Range, symmetric: bool) -> tuple[float, int]:
    """Return scale and zero point of a range: s = (max - min) / 255, z = round(-min / s), 0 always inside.

    Symmetric: s = 2 max(|min|, |max|) / 254, z = 0, for integers of -127..127.
    """
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    if symmetric:
        peak = max(-low, high)
        return (peak / 127 if peak > 0 else 1.0), 0
    if high == low:
        return 1.0, 0
    scale = (high - low) / 255
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))
