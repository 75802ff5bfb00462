"""Weights and biases of Conv, ConvTranspose, Gemm and MatMul layers in one layout.

w_GOIT: groups, output channels of a group, input channels of a group, kernel taps (1 for Gemm and MatMul)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from omgoptim.models.onnx_file import attribute, initializers, set_values
from omgoptim.models.onnx_graph import OnnxLayer

OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """A layer whose weight is a stored float32 tensor that no other node reads."""

    node: NodeProto
    weight: TensorProto
    groups: int
    transposed: bool
    """True for a stored matrix (out, in), as of a Gemm with transB."""

    @property
    def name(self) -> str:
        return str(self.node.name)

    def read(self) -> NDArray[np.float32]:
        """Return the weight as w_GOIT."""
        return self.arrange(numpy_helper.to_array(self.weight))

    def write(self, w_GOIT: NDArray[np.float32]) -> None:
        """Store a weight given as w_GOIT, in place."""
        set_values(self.weight, self.restore(w_GOIT))

    def arrange(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Reshape a tensor of the weight's shape to (G, O, I, T)."""
        if self.node.op_type == "Conv":
            return stored.reshape(self.groups, stored.shape[0] // self.groups, stored.shape[1], -1)
        if self.node.op_type == "ConvTranspose":
            in_first = stored.reshape(self.groups, stored.shape[0] // self.groups, stored.shape[1], -1)
            return np.asarray(in_first.swapaxes(1, 2))
        matrix = stored if self.transposed else stored.T
        return matrix.reshape(1, *matrix.shape, 1)

    def restore(self, arranged: NDArray[Any]) -> NDArray[Any]:
        """Reshape (G, O, I, T) back to the weight's shape."""
        shape = tuple(self.weight.dims)
        if self.node.op_type == "ConvTranspose":
            arranged = arranged.swapaxes(1, 2)
        elif self.node.op_type != "Conv":
            matrix = arranged[0, :, :, 0]
            arranged = matrix if self.transposed else matrix.T
        return np.ascontiguousarray(arranged).reshape(shape)


def find_layer_weights(model: ModelProto, chosen: Sequence[OnnxLayer]) -> list[LayerWeight]:
    """Find the chosen layers of `OPS` whose weight no other node reads, in graph order."""
    tensors = initializers(model)
    reads = Counter(name for node in model.graph.node for name in node.input)
    names = {layer.node for layer in chosen}
    found = []
    for node in model.graph.node:
        if node.name not in names or node.op_type not in OPS:
            continue
        tensor = tensors.get(node.input[1])
        if tensor is None or tensor.data_type != TensorProto.FLOAT or reads[tensor.name] != 1:
            continue
        if node.op_type in ("Gemm", "MatMul") and len(tensor.dims) != 2:
            continue
        if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1):
            continue
        found.append(LayerWeight(node, tensor, attribute(node, "group", 1), bool(attribute(node, "transB", 0))))
    return found


def bias_of(model: ModelProto, layer: LayerWeight) -> NDArray[np.float32] | None:
    """Return the bias (O,) of a layer: zeros if it has none, None if it cannot be changed.

    A MatMul has no bias input: its bias is the Add after it, which the quantizer rounds by itself.
    """
    outputs = layer.read().shape[0] * layer.read().shape[1]
    if layer.node.op_type == "MatMul":
        return None
    if len(layer.node.input) < 3 or not layer.node.input[2]:
        return np.zeros(outputs, np.float32)
    tensor = initializers(model).get(layer.node.input[2])
    reads = sum(name == layer.node.input[2] for node in model.graph.node for name in node.input)
    unshared = reads == 1 and attribute(layer.node, "beta", 1.0) == 1
    if tensor is None or tensor.data_type != TensorProto.FLOAT or not unshared:
        return None
    values = numpy_helper.to_array(tensor).reshape(-1)
    return np.broadcast_to(values, (outputs,)).copy() if values.size in (1, outputs) else None


def set_bias(model: ModelProto, node: NodeProto, bias_O: NDArray[np.float32]) -> None:
    """Give a node of `model` a bias, in place: the stored one changes, or one is added."""
    name = node.input[2] if len(node.input) > 2 else ""
    if not name:
        name = f"{node.name}_bias"
        node.input[:] = [*node.input[:2], name]
        model.graph.initializer.add(name=name)
    set_values(initializers(model)[name], bias_O.astype(np.float32))
