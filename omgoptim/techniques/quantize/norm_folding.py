"""Fold batch norms into the layers before them where ONNX Runtime does not. Registers no technique.

    a_O = scale_O / sqrt(var_O + epsilon),   w'_O = a_O w_O,   b'_O = a_O (b_O - mean_O) + shift_O

torch's exporter folds them after Conv, ConvTranspose and Linear, ONNX Runtime after Conv; a file from elsewhere may
still have one after a Gemm or a ConvTranspose. One that stands behind something else (a ReLU) stays, in float.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from onnx import ModelProto, numpy_helper

from omgoptim.models.onnx_graph import layers
from omgoptim.techniques.quantize.weighted import bias_of, set_bias, weighted_layers

EPSILON = 1e-5
"""Of BatchNormalization, where the node does not say."""


def fold_norms(model: ModelProto) -> int:
    """Fold every batch norm that is the only reader of a layer's output, in place; how many were folded."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    reads = Counter(name for node in model.graph.node for name in node.input)
    reads.update(value.name for value in model.graph.output)
    makers = {layer.node.output[0]: layer for layer in weighted_layers(model, layers(model))}
    folded = []
    for node in model.graph.node:
        layer = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if layer is None or reads[node.input[0]] != 1 or any(name not in tensors for name in node.input[1:]):
            continue
        bias = bias_of(model, layer)
        if bias is None or any(node.output[1:]):
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(tensors[name]) for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), EPSILON)
        a_O = scale / np.sqrt(variance + epsilon)
        w_GOIT = layer.read()
        layer.write((w_GOIT * a_O.reshape(*w_GOIT.shape[:2], 1, 1)).astype(np.float32))
        set_bias(model, layer.node, a_O * (bias - mean) + shift)
        layer.node.output[0] = node.output[0]
        folded.append(node)
    for node in folded:
        model.graph.node.remove(node)
    return len(folded)
