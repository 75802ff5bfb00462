"""Find the first layers of a program that are cheap enough to stay in float.

Every later layer reads the quantization error of the first ones; in convolution networks these have few weights and,
for their size, few multiply-accumulates. Integer kernels are often no faster there: three input channels do not fill a
vector register.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from onnx import ModelProto, TensorProto

from omgoptim.models.onnx_graph import OnnxLayer

MAX_FLOAT_LAYERS = 3
"""Maximum number of first layers that may stay in float."""

MAX_WORK_SHARE = 0.04
"""Maximum share of the chosen layers' multiply-accumulates, and of their weights, that layers in float may have."""


def affordable_prefixes(model: ModelProto, chosen: Sequence[OnnxLayer]) -> Iterator[list[OnnxLayer]]:
    """Yield the first layer, the first two … in graph order, while their share of the work is small.

    Nothing for a program in which the size of an output is unknown.
    """
    places = {node.name: at for at, node in enumerate(model.graph.node)}
    ordered = sorted((layer for layer in chosen if layer.op != "Gather"), key=lambda layer: places[layer.node])
    work = {layer.node: _multiply_accumulates(model, layer) for layer in ordered}
    if None in work.values():
        return
    macs, weights = (sum(one) for one in ([work[x.node] or 0 for x in ordered], [_size(x) for x in ordered]))
    for count in range(1, min(MAX_FLOAT_LAYERS, len(ordered) - 1) + 1):
        first = ordered[:count]
        if sum(work[layer.node] or 0 for layer in first) > MAX_WORK_SHARE * macs:
            return
        if sum(map(_size, first)) > MAX_WORK_SHARE * weights:
            return
        yield first


def multiply_accumulates(model: ModelProto, chosen: Sequence[OnnxLayer]) -> int | None:
    """Count the MACs of one sample in the chosen layers; None where an output size is unknown."""
    work = [_multiply_accumulates(model, layer) for layer in chosen if layer.op != "Gather"]
    return None if None in work else sum(one or 0 for one in work)


def restore_float_layers(model: ModelProto, reference: ModelProto, kept: Sequence[OnnxLayer]) -> ModelProto:
    """Return a copy of the program with some layers' weights and biases from the reference."""
    copy = ModelProto()
    copy.CopyFrom(model)
    nodes = {node.name: node for node in copy.graph.node}
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    floats: dict[str, TensorProto] = {tensor.name: tensor for tensor in reference.graph.initializer}
    originals = {node.name: node for node in reference.graph.node}
    for layer in kept:
        del nodes[layer.node].input[:]  # a bias may have been added
        nodes[layer.node].input.extend(originals[layer.node].input)
        for name in originals[layer.node].input:
            if name in floats and name in tensors:
                tensors[name].CopyFrom(floats[name])
    return copy


def _multiply_accumulates(model: ModelProto, layer: OnnxLayer) -> int | None:
    """Count a layer's MACs of one sample; None where its output size is unknown."""
    if layer.op == "Gemm":
        return _size(layer)
    node = next(node for node in model.graph.node if node.name == layer.node)
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    if node.output[0] not in known or layer.op not in ("Conv", "MatMul"):
        return None
    dims = known[node.output[0]].type.tensor_type.shape.dim
    places = dims[2:] if layer.op == "Conv" else dims[1:-1]
    if not all(dim.HasField("dim_value") for dim in places):
        return None
    return _size(layer) * int(np.prod([dim.dim_value for dim in places]))


def _size(layer: OnnxLayer) -> int:
    return int(np.prod(layer.shape))
