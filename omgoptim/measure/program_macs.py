"""Multiply-accumulates of one sample of an ONNX program, node by node, float or quantized.

The same convention as `macs.py`, so that a module and its export count the same: matrix products, convolutions,
recurrent layers and attention; no biases, activations, normalisation or pooling. Shapes come from ONNX's own shape
inference at the shapes of one sample, and for the remaining ones from running the program once. An operator without a
rule, or without known shapes, makes the count None with a reason: a partial count would be wrong.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from omgoptim.errors import ModelError
from omgoptim.models.onnx_file import bodies, graphs, load, save

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

STANDARD = ("", "ai.onnx")
"""Domain of ONNX's standard operators."""
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

NO_PRODUCTS = {
    "BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "DequantizeLinear", "DynamicQuantizeLinear",
    "FastGelu", "Gelu", "GroupNorm", "NhwcMaxPool", "QLinearAdd", "QLinearAveragePool", "QLinearConcat",
    "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul", "QLinearReduceMean", "QLinearSigmoid",
    "QLinearSoftmax", "QLinearWhere", "QuantizeLinear", "QuickGelu", "ReorderInput", "ReorderOutput",
    "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}  # fmt: skip
"""ONNX Runtime's own operators that multiply no matrices."""

NO_RULE = {"AffineGrid", "DeformConv"}
"""Standard operators that multiply matrices in a way that is not counted here."""

log = logging.getLogger(__name__)


class UncountableProgram(Exception):
    """Reason why a program cannot be counted."""


@dataclass(frozen=True, slots=True)
class ProgramMacs:
    """The multiply-accumulates of one sample."""

    macs: int | None
    by_node: dict[str, int]
    """Node name, as `onnx_file.load` gives it, to multiply-accumulates; they add up to `macs`."""
    reason: str | None = None
    """Reason for the absent number."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A node with the shapes of its inputs and of its first output."""

    proto: NodeProto
    shapes: Shapes

    def input(self, position: int) -> Shape:
        return self.shapes[self.proto.input[position]]

    @property
    def output(self) -> Shape:
        return self.shapes[self.proto.output[0]]

    def has(self, position: int) -> bool:
        return position < len(self.proto.input) and bool(self.proto.input[position])

    def attribute(self, name: str, default: Any) -> Any:
        found = next((a for a in self.proto.attribute if a.name == name), None)
        return default if found is None else onnx.helper.get_attribute_value(found)


def count_program(path: Path, sample: Mapping[str, NDArray[Any]]) -> ProgramMacs:
    """Count the program at `path`.

    Args:
        path: an ONNX file.
        sample: its inputs by name, batch 1.

    Returns:
        The count; None with a reason, which is logged, if any node of it cannot be counted.
    """
    try:
        by_node = _count(path, sample)
    except (UncountableProgram, ModelError) as error:
        log.warning("the MACs of %s were not counted: %s", path.name, error)
        return ProgramMacs(None, {}, str(error))
    return ProgramMacs(sum(by_node.values()), by_node)


def _count(path: Path, sample: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    model = load(path, weights=False)
    if model.functions:
        raise UncountableProgram("the program defines model-local functions")
    counted = [node for node in model.graph.node if _rule(node)]
    needed = {name for node in counted for name in (*node.input, node.output[0]) if name}
    shapes = _inferred(model, sample) if needed else {}
    unknown = sorted(needed - set(shapes))
    if unknown:
        shapes = {**shapes, **_measured(path, unknown, sample)}
    return {node.name: _of_node(node, shapes) for node in counted}


def _of_node(node: NodeProto, shapes: Shapes) -> int:
    rule = _rule(node)
    if rule is None:
        return 0
    try:
        return rule(_Node(node, shapes))
    except (IndexError, KeyError) as error:
        raise UncountableProgram(f"the shapes of {node.op_type} {node.name} are not as expected: {error}") from error


def _rule(node: NodeProto) -> Callable[[_Node], int] | None:
    """Return the formula of a node; None if it has no matrix products.

    Raises:
        UncountableProgram: it may have some, and there is no formula.
    """
    for body in bodies(node):
        for graph in graphs(body):
            if any(_rule(inner) for inner in graph.node):
                raise UncountableProgram(f"the number of iterations of {node.op_type} {node.name} depends on the data")
    standard = node.domain in STANDARD
    if (standard or node.domain == CONTRIB) and node.op_type in RULES:
        return RULES[node.op_type]
    if (standard and node.op_type not in NO_RULE) or (node.domain == CONTRIB and node.op_type in NO_PRODUCTS):
        return None
    raise UncountableProgram(f"operator {node.domain or 'ai.onnx'}.{node.op_type} is not supported")


# Shapes


def _inferred(model: ModelProto, sample: Mapping[str, NDArray[Any]]) -> dict[str, Shape]:
    """Infer shapes from the sample's with ONNX's shape inference."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in fixed.graph.input:
        if value.name not in sample:
            raise UncountableProgram(f"the sample has no input '{value.name}'")
        _fix(value, sample[value.name].shape)
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    except Exception as error:  # noqa: BLE001  its errors have no common base, and running the program says the same
        log.info("shape inference failed: %s", error)
        inferred = fixed.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim):
            shapes[value.name] = tuple(size.dim_value for size in kind.shape.dim)
    return shapes


def _fix(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    kind = value.type.tensor_type
    stated = [size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim]
    if kind.HasField("shape") and (
        len(stated) != len(shape) or any(s not in (None, size) for s, size in zip(stated, shape, strict=True))
    ):
        raise UncountableProgram(f"input '{value.name}' has the fixed shape {stated}, but one sample has {list(shape)}")
    del kind.shape.dim[:]
    for size in shape:
        kind.shape.dim.add().dim_value = size


def _measured(path: Path, names: Sequence[str], sample: Mapping[str, NDArray[Any]]) -> dict[str, Shape]:
    """Run the program on the sample for the shapes of the remaining tensors."""
    import onnxruntime

    model = load(path)
    del model.graph.value_info[:]
    outputs = [f"omgoptim_shape_{index}" for index in range(len(names))]
    for name, output in zip(names, outputs, strict=True):
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [output], name=output))
        model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.INT64, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "shapes.onnx")
        try:
            session = onnxruntime.InferenceSession(
                str(Path(folder) / "shapes.onnx"), options, providers=["CPUExecutionProvider"]
            )
            shapes = session.run(outputs, {value.name: sample[value.name] for value in session.get_inputs()})
        except Exception as error:  # ONNX Runtime's errors have no common base
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UncountableProgram(
                f"the shape of '{names[0]}' is unknown, and running the program failed: {reason}"
            ) from error
    return {name: tuple(int(size) for size in np.asarray(shape)) for name, shape in zip(names, shapes, strict=True)}


# Formulas


def _convolution(weight: int) -> Callable[[_Node], int]:
    """Return the count of a kernel (M, C / groups, k...) at every output position."""
    return lambda node: prod(node.output) * prod(node.input(weight)[1:])


def _transposed(node: _Node) -> int:
    """Count a kernel (C, M / groups, k...) at every input position."""
    return prod(node.input(0)) * prod(node.input(1)[1:])


def _product(node: _Node) -> int:
    """Count (..., L, K) times (..., K, N): K for every element of the result."""
    return prod(node.output) * node.input(0)[-1]


def _fused_product(node: _Node) -> int:
    if node.attribute("transBatchA", 0) or node.attribute("transBatchB", 0):
        raise UncountableProgram(f"{node.proto.op_type} {node.proto.name} transposes batches")
    return prod(node.output) * node.input(0)[-2 if node.attribute("transA", 0) else -1]


def _gemm(node: _Node) -> int:
    return prod(node.output) * node.input(0)[0 if node.attribute("transA", 0) else 1]


def _recurrent(node: _Node) -> int:
    """Count every weight once per step: X (L, B, I) or (B, L, I), the weights of all directions."""
    if node.has(4):
        raise UncountableProgram(f"the steps of {node.proto.op_type} {node.proto.name} depend on sequence lengths")
    steps, batch, _ = node.input(0)
    return steps * batch * (prod(node.input(1)) + prod(node.input(2)))


def _einsum(node: _Node) -> int:
    """Count a product over two operands: every combination of their indices."""
    equation = node.attribute("equation", b"").decode().replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2 or "." in equation:
        raise UncountableProgram(f"Einsum {equation} is not supported")
    sizes: dict[str, int] = {}
    for position, term in enumerate(terms):
        for letter, size in zip(term, node.input(position), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return prod(sizes.values())


def _attention(node: _Node) -> int:
    """Count scores and their product with the values: query (B, H, L, E), key (B, G, S, E), value (B, G, S, V)."""
    query, key, value = (node.input(position) for position in range(3))
    if node.proto.domain not in STANDARD or node.has(4) or len(query) != 4:
        raise UncountableProgram(f"this form of {node.proto.op_type} {node.proto.name} is not supported")
    return prod(query[:3]) * key[2] * (query[3] + value[3])


RULES: dict[str, Callable[[_Node], int]] = {
    "Conv": _convolution(1),
    "FusedConv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "DynamicQuantizeMatMul": _product,
    "MatMulIntegerToFloat": _product,
    "MatMulNBits": _product,
    "FusedMatMul": _fused_product,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "QGemm": _gemm,
    "RNN": _recurrent,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "DynamicQuantizeLSTM": _recurrent,
    "Einsum": _einsum,
    "Attention": _attention,
}
"""Operator to its formula. A quantized one costs what the float one does: the same products, of integers."""
