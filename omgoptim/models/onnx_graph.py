"""Analysis of an ONNX graph: layers with weights, their module paths, and the graph's traits."""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from omgoptim.errors import NoLayerChanged, did_you_mean
from omgoptim.models.globs import matches
from omgoptim.models.onnx_file import SCOPES, attribute, bodies, graphs, load, tensor_bytes

FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
INT_TYPES = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
PARAMETER_TYPES = (*FLOAT_TYPES, *INT_TYPES, TensorProto.INT32)
"""Types that parameters are stored in: a quantized bias is int32."""

NO_MODULE = "_empty_nn_module_stack"
"""Module path that torch's exporter writes for nodes of its own."""

WEIGHT_NAME = re.compile(r"(?:q_output_)?(?P<module>.+)\.weight(?:_Transposed)?(?:_quantized)?(?:_\d+)?")
"""A module's weight, also as a quantizer renamed it."""

WEIGHT_INPUTS = {
    "Conv": (1,), "ConvTranspose": (1,), "ConvInteger": (1,), "QLinearConv": (3,),
    "Gemm": (1,), "MatMul": (1, 0), "MatMulInteger": (1,), "QLinearMatMul": (3,),
    "LSTM": (1, 2), "DynamicQuantizeLSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
    "Gather": (0,),
}  # fmt: skip
"""Weight inputs of each op, the likelier first."""

SCALE_INPUTS = {
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "DynamicQuantizeLSTM": (8, 9, 10, 11),
    "MatMulInteger": (2, 3), "ConvInteger": (2, 3),
    "DynamicQuantizeMatMul": (2, 3), "MatMulIntegerToFloat": (2, 3, 4, 5),
    "QLinearConv": (1, 2, 4, 5, 6, 7), "QLinearMatMul": (1, 2, 4, 5, 6, 7),
}  # fmt: skip
"""Inputs of each op that are scales or zero points."""

ZERO_POINT_OF = {("DequantizeLinear", 0): 2, ("MatMulInteger", 1): 3, ("ConvInteger", 1): 3,
                 ("DynamicQuantizeLSTM", 1): 9, ("DynamicQuantizeLSTM", 2): 11}  # fmt: skip
"""(op, input) of an integer weight to the input that is its zero point."""

NIBBLES, NIBBLES_ZERO = "_nibbles", 8
"""Suffix, before `_quantized`, of a table with two 4-bit integers a byte; and their zero point."""

CONV = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv")
"""Convolutions, float and quantized."""
MATMUL = ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul")
"""Matrix products, float and quantized."""
RECURRENT = ("LSTM", "DynamicQuantizeLSTM", "GRU", "RNN")
"""Recurrent layers, float and quantized."""
ATTENTION = ("Attention", "MultiHeadAttention", "QAttention", "GroupQueryAttention")
"""Fused attention operators."""


@dataclass(frozen=True, slots=True)
class OnnxLayer:
    """A node with stored weights."""

    node: str
    op: str
    path: str
    """Module path, for instance `encoder.0.linear`; else the weight's or the node's name."""
    weight: str
    """Name of the (largest) stored tensor behind the weight."""
    weights: tuple[str, ...]
    """All of them: a recurrent layer has two."""
    shape: tuple[int, ...]
    data_type: int
    weight_bytes: int

    @property
    def is_quantized(self) -> bool:
        """Return whether the weight is stored as integers."""
        return self.data_type in INT_TYPES

    @property
    def what(self) -> str:
        """Operator and shape, as `Conv 16x3x3x3`."""
        return f"{self.op} {'x'.join(str(size) for size in self.shape)}"


@dataclass(frozen=True, slots=True)
class GraphTraits:
    """Properties that decide which techniques apply. Bytes are those stored, shared weights once."""

    has_gru: bool
    matmul_weight_bytes: int
    conv_weight_bytes: int
    recurrent_weight_bytes: int
    embedding_weight_bytes: int
    total_weight_bytes: int


def graph_traits(path: Path) -> GraphTraits:
    """Read the traits of the program at `path`, without its external data.

    Raises:
        ModelError: the file is not readable ONNX.
    """
    model = load(path, weights=False)
    ops = {node.op_type for graph in graphs(model.graph) for node in graph.node}
    found = find_layers(model)

    def weight_bytes(kinds: Sequence[str]) -> int:
        return sum({layer.weight: layer.weight_bytes for layer in found if layer.op in kinds}.values())

    return GraphTraits(
        has_gru="GRU" in ops,
        matmul_weight_bytes=weight_bytes(MATMUL),
        conv_weight_bytes=weight_bytes(CONV),
        recurrent_weight_bytes=weight_bytes(RECURRENT),
        embedding_weight_bytes=weight_bytes(("Gather",)),
        total_weight_bytes=sum(tensor_bytes(tensor) for tensor, _ in _parameters(model)),
    )


def count_params(path: Path) -> tuple[int, int]:
    """Count the stored parameters and the non-zero ones: float and integer weights, no scales or zero points.

    An integer weight is zero where it equals its zero point.
    """
    params = nonzero = 0
    for tensor, zero_point in _parameters(load(path)):
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name.endswith(f"{NIBBLES}_quantized"):
            values, zero_point = np.stack([values & 15, values >> 4]), np.array(NIBBLES_ZERO)
        params += int(values.size)
        differs = values.astype(np.float32) if zero_point is None else values.astype(np.int32) != zero_point
        nonzero += int(np.count_nonzero(differs))
    return params, nonzero


def has_attention(model: ModelProto) -> bool:
    """Return whether the graph has an attention op, or a Softmax whose result multiplies another activation."""
    constants = constant_roots(model.graph)
    passes = ("Cast", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear", "Reshape", "Transpose", "Where")
    found = False
    for graph in graphs(model.graph):
        weights: set[str] = set()  # tensors that are a softmax, perhaps moved about
        for node in graph.node:
            if node.op_type in ATTENTION:
                return True
            if node.op_type == "Softmax" or (node.op_type in passes and weights.intersection(node.input)):
                weights.update(node.output)
            elif node.op_type in ("MatMul", "Einsum") and weights.intersection(node.input):
                found = found or not any(name in constants for name in node.input)
    return found


def constant_roots(graph: GraphProto, outer: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, tuple[str, ...]]:
    """Map tensors computed from initializers only to the names of these, bodies of control flow included.

    Of a DequantizeLinear only the values count, not the scale and the zero point; of integers cast and multiplied, only
    the integers.
    """
    roots = dict(outer or {})
    integers = cast_integers(graph)
    roots.update({tensor.name: (tensor.name,) for tensor in graph.initializer})
    for node in graph.node:
        inside = bodies(node)
        for body in inside:
            roots.update(constant_roots(body, roots))
        inputs = [name for name in node.input if name]
        if node.op_type == "Constant":
            made_of: tuple[str, ...] = ()
        elif inputs and not inside and not node.op_type.startswith("Random") and all(n in roots for n in inputs):
            named = inputs[:1] if node.op_type == "DequantizeLinear" else inputs
            if node.op_type == "Mul" and not integers.isdisjoint(inputs):
                named = [name for name in inputs if name in integers]
            made_of = tuple(dict.fromkeys(itertools.chain.from_iterable(roots[name] for name in named)))
        else:
            continue
        roots.update(dict.fromkeys(node.output, made_of))
    return roots


def cast_integers(graph: GraphProto) -> set[str]:
    """Return the tensors that are cast integer initializers; the other factor of a Mul is their scale."""
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type in INT_TYPES}
    return {node.output[0] for node in graph.node if node.op_type == "Cast" and node.input[0] in stored}


def module_paths(model: ModelProto) -> dict[str, str]:
    """Map node names and output names to module paths of torch's exporter; empty for other files.

    A rewrite keeps one or the other of a node's names, so both lead to its path.
    """
    paths: dict[str, str] = {}
    for graph in graphs(model.graph):
        for node in graph.node:
            scopes = _scopes(node)
            if len(scopes) > 1 and scopes[-2] and not scopes[-2].startswith(NO_MODULE):
                paths.update(dict.fromkeys((*node.output, node.name), scopes[-2]))
    return paths


def find_layers(model: ModelProto, paths: Mapping[str, str] | None = None) -> list[OnnxLayer]:
    """Find the nodes with weights, in graph order. `paths` are those of the source, if `model` is a rewrite of it."""
    paths = module_paths(model) if paths is None else paths
    tensors = {tensor.name: tensor for graph in graphs(model.graph) for tensor in graph.initializer}
    roots = constant_roots(model.graph)
    found: list[tuple[NodeProto, list[TensorProto]]] = []
    for graph in graphs(model.graph):
        for node in graph.node:
            weights = _weights_of(node, roots, tensors)
            if weights:
                found.append((node, weights))
    uses = Counter(weight.name for _, weights in found for weight in weights)
    result = []
    for node, weights in found:
        largest = max(weights, key=tensor_bytes)
        result.append(
            OnnxLayer(
                node=node.name,
                op=node.op_type,
                path=_path_of(node, largest.name, uses[largest.name], paths),
                weight=largest.name,
                weights=tuple(weight.name for weight in weights),
                shape=tuple(largest.dims),
                data_type=largest.data_type,
                weight_bytes=sum(tensor_bytes(weight) for weight in weights),
            )
        )
    return result


def is_mixed_precision(model: ModelProto) -> bool:
    """Return whether a layer in float reads dequantized values: ONNX Runtime may quantize it when it opens the file."""
    dequantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    layers = (node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm"))
    return any(node.input[0] in dequantized and node.input[1] in floats for node in layers)


def select_layers(layers: Sequence[OnnxLayer], targets: Sequence[str], ignore: Sequence[str]) -> list[OnnxLayer]:
    """Select the layers that `targets` match (all, if empty) and `ignore` does not.

    A glob names a layer by its path, or by the path of a module around it: `encoder` is all of the encoder.

    Raises:
        NoLayerChanged: a glob names no layer.
    """
    for glob in (*targets, *ignore):
        if not any(_names(glob, layer) for layer in layers):
            raise NoLayerChanged(
                f"'{glob}' matches no layer of this model", did_you_mean(glob, {layer.path for layer in layers})
            )
    return [
        layer
        for layer in layers
        if (not targets or any(_names(glob, layer) for glob in targets))
        and not any(_names(glob, layer) for glob in ignore)
    ]


def _names(glob: str, layer: OnnxLayer) -> bool:
    return layer.node == glob or matches(glob, layer.path)


def _scopes(node: NodeProto) -> list[str]:
    text = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []


def _path_of(node: NodeProto, weight: str, uses: int, paths: Mapping[str, str]) -> str:
    """Return the module path of a node; a weight with one reader names it best, as after batch-norm folding."""
    named = WEIGHT_NAME.fullmatch(weight)
    module = named["module"] if named else ""
    known = next((paths[name] for name in (node.name, *node.output) if name in paths), "")
    if uses == 1 and module and not (known and node.op_type == "Gather"):  # a tied embedding has the other's name
        return module
    return known or module or node.name or weight


def _weights_of(
    node: NodeProto, roots: Mapping[str, tuple[str, ...]], tensors: Mapping[str, TensorProto]
) -> list[TensorProto]:
    positions = WEIGHT_INPUTS.get(node.op_type, ())
    gathers = node.op_type == "Gather"  # an embedding: rows of a matrix, chosen by an input
    if gathers and (attribute(node, "axis", 0) != 0 or len(node.input) < 2 or node.input[1] in roots):
        return []
    weights: list[TensorProto] = []
    for position in positions:
        name = node.input[position] if position < len(node.input) else ""
        stored = [tensors[root] for root in roots.get(name, ()) if root in tensors]
        stored = [t for t in stored if t.data_type in FLOAT_TYPES + INT_TYPES and (not gathers or len(t.dims) == 2)]
        weights += [tensor for tensor in stored if tensor not in weights]
        if weights and node.op_type == "MatMul":
            break
    return weights


def _parameters(model: ModelProto) -> Iterator[tuple[TensorProto, np.ndarray | None]]:
    """Yield each stored parameter once, with the zero point of an integer one in a shape that broadcasts to it."""
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    tensors = {tensor.name: tensor for graph in graphs(model.graph) for tensor in graph.initializer}
    scales = {node.input[i] for node in nodes for i in SCALE_INPUTS.get(node.op_type, ()) if i < len(node.input)} | {
        name.removesuffix("_quantized") + "_scale" for name in tensors if name.endswith("_quantized")
    }
    integers = {name for graph in graphs(model.graph) for name in cast_integers(graph)}
    scales |= {
        name
        for node in nodes
        if node.op_type == "Mul" and not integers.isdisjoint(node.input)
        for name in node.input
        if name not in integers
    }
    biases = {node.input[0] for node in nodes if node.op_type == "DequantizeLinear"}
    zero_points = dict(_zero_points(nodes, tensors))
    for name, tensor in tensors.items():
        integer = tensor.data_type in INT_TYPES or (tensor.data_type == TensorProto.INT32 and name in biases)
        if name not in scales and (integer or tensor.data_type in FLOAT_TYPES):
            yield tensor, zero_points.get(name, np.zeros((), np.int32)) if integer else None


def _zero_points(nodes: Iterable[NodeProto], tensors: Mapping[str, TensorProto]) -> Iterator[tuple[str, np.ndarray]]:
    for node in nodes:
        for (op, position), at in ZERO_POINT_OF.items():
            if op != node.op_type or at >= len(node.input) or node.input[at] not in tensors:
                continue
            zero = onnx.numpy_helper.to_array(tensors[node.input[at]])
            zero = zero.astype(np.int16) if zero.dtype.itemsize == 1 else zero
            if zero.size == 1 or not zero.any():
                yield node.input[position], zero.reshape(-1)[:1] if zero.size else zero
            elif op == "DequantizeLinear" and node.input[position] in tensors:
                axis = attribute(node, "axis", 1)
                rank = len(tensors[node.input[position]].dims)
                if block := attribute(node, "block_size", 0):
                    size = tensors[node.input[position]].dims[axis % rank]
                    yield node.input[position], zero.repeat(block, axis % rank).take(range(size), axis % rank)
                    continue
                yield node.input[position], zero.reshape([-1 if d == axis % rank else 1 for d in range(rank)])
