"""Embedding tables in int8 or 4 bits; only the rows that are looked up are converted to float.

8 bits: ONNX Runtime's own quantizer has one scale per table; a scale per row costs 4 bytes a row and bounds each row's
error by its own largest value.

    s_V1 = max_D |w_VD| / 127,   q_VD = round(w_VD / s_V1),   out = Cast(Gather(q, ids)) * Gather(s, ids)

4 bits: one float16 scale per group of weights in a row, of the factors in `FACTORS` the one with the smallest squared
error. The scale has the sign that makes the largest weight of a group -8, the end of the range (Q4_0 of GGML). ONNX's
own 4-bit tensors cannot be looked up by row, so two integers share a byte, and standard operators divide them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from omgoptim.models.onnx_file import initializers, replace_nodes
from omgoptim.models.onnx_graph import NIBBLES, NIBBLES_ZERO, OnnxLayer
from omgoptim.techniques.quantize._onnx.weight_storage import store_rows

GROUPS = (32, 16)
"""Weights per scale, the first that divides a row. Chosen: 32 takes 4.5 bits a weight; 64 would take 4.25 and lose
more."""

FACTORS = (0.8, 0.9, 1.0)
"""Scales that are tried, relative to the one that covers the largest weight. Chosen: each costs a pass."""

ROWS_AT_ONCE = 8192
"""Rows of a table that are quantized at a time. Chosen by memory."""


Steps = list[tuple[str, list[str], str, dict[str, Any]]]
"""Nodes to make: operator, inputs, name of the result, attributes."""


def quantize_embeddings(model: ModelProto, chosen: Sequence[OnnxLayer], per_row: bool, num_bits: int = 8) -> None:
    """Store the float32 matrices of the chosen embeddings as integers, in place; a shared one once.

    Args:
        model: the program.
        chosen: layers to quantize; those that are no embedding are left.
        per_row: one scale per row in 8 bits, or one for the table.
        num_bits: 8 or 4. A row that no group size divides has 8.
    """
    selected = {layer.node for layer in chosen if layer.op == "Gather"}
    tensors, ranks = initializers(model), _ranks(model)
    stored: set[str] = set()
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        tensor = tensors.get(node.input[0]) if node.name in selected else None
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            rewritten.append(node)
            continue
        group = group_size(tensor.dims[1]) if num_bits == 4 else None
        if tensor.name not in stored:
            stored.add(tensor.name)
            if group is None:
                store_rows(model, tensor, f"{tensor.name}_rows", per_row)
            else:
                _store_nibbles(model, tensor, group)
        if group is None:
            rewritten += _lookup_int8(node, tensor.name, per_row)
        else:
            rewritten += _lookup_nibbles(node, tensor, group, ranks.get(node.input[1]))
    replace_nodes(model.graph, rewritten)


def group_size(width: int) -> int | None:
    """Return the number of weights per scale for rows of a width; None where no size divides it."""
    return next((size for size in GROUPS if width % size == 0), None)


def quantize_groups(w: NDArray[np.float32], group: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Quantize rows (V, D) to 4 bits with a scale per group.

    Returns:
        Integers (V, D), 0 .. 15, whose zero point is 8; and scales (V, D / group, 1).
    """
    grouped = w.reshape(len(w), -1, group)
    peak = np.abs(grouped).argmax(axis=-1, keepdims=True)
    full_scale = np.take_along_axis(grouped, peak, -1) / -8
    integers, scales, errors = np.empty(grouped.shape, np.uint8), np.empty(full_scale.shape, np.float16), None
    for factor in FACTORS:
        rounded = (full_scale * factor).astype(np.float16)
        scale = np.where(rounded == 0, np.float16(1), rounded).astype(np.float32)
        q = np.clip(np.rint(grouped / scale), -8, 7)
        error = np.square(q * scale - grouped).sum(axis=-1, keepdims=True)
        better = np.ones(error.shape, bool) if errors is None else error < errors
        errors = error if errors is None else np.minimum(error, errors)
        integers = np.where(better, (q + NIBBLES_ZERO).astype(np.uint8), integers)
        scales = np.where(better, scale.astype(np.float16), scales)
    return integers.reshape(w.shape), scales


def _store_nibbles(model: ModelProto, tensor: TensorProto, group: int) -> None:
    """Add a table's integers (V, D / 2), the left half of a row in the low bits, and its scales (V, D / group, 1)."""
    w, half = numpy_helper.to_array(tensor), tensor.dims[1] // 2
    parts = [quantize_groups(w[start : start + ROWS_AT_ONCE], group) for start in range(0, len(w), ROWS_AT_ONCE)]
    integers = np.concatenate([part for part, _ in parts])
    packed = integers[:, :half] | (integers[:, half:] << 4)
    scales = np.concatenate([part for _, part in parts])
    model.graph.initializer.append(numpy_helper.from_array(packed, f"{tensor.name}{NIBBLES}_quantized"))
    model.graph.initializer.append(numpy_helper.from_array(scales, f"{tensor.name}{NIBBLES}_scale"))


def _ranks(model: ModelProto) -> dict[str, int]:
    """Return the known ranks of inputs and intermediate tensors."""
    known = (*model.graph.input, *model.graph.value_info)
    return {
        value.name: len(value.type.tensor_type.shape.dim) for value in known if value.type.tensor_type.HasField("shape")
    }


def _lookup_int8(node: NodeProto, weight: str, per_row: bool) -> list[NodeProto]:
    """Return the nodes that look up int8 rows and convert them."""
    name, out = f"{node.name}_quantized_rows", node.output[0]
    integers = _gather(node, f"{weight}_rows_quantized", f"{out}_int8", name)
    cast = helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], f"{name}_cast", to=TensorProto.FLOAT)
    nodes, scale = [integers, cast], f"{weight}_rows_scale"
    if per_row:
        scale = f"{out}_scale_of_row"
        nodes.append(helper.make_node("Gather", [f"{weight}_rows_scale", node.input[1]], [scale], f"{name}_scale"))
    return [*nodes, helper.make_node("Mul", [f"{out}_float", scale], [out], f"{name}_mul")]


def _lookup_nibbles(node: NodeProto, tensor: TensorProto, group: int, rank: int | None) -> list[NodeProto]:
    """Return the nodes that look up rows of two integers a byte, divide them, and apply the scales of their groups."""
    name, table, width = f"{node.name}_quantized_rows", f"{tensor.name}{NIBBLES}", tensor.dims[1]
    shapes = {"by_group": [width // group, group], "by_row": [width]}
    steps: Steps = [
        ("Constant", [], "base", {"value_float": 16.0}),
        ("Constant", [], "zero", {"value_float": float(NIBBLES_ZERO)}),
        ("Cast", [f"{name}_bytes"], "float", {"to": TensorProto.FLOAT}),
        ("Div", [f"{name}_float", f"{name}_base"], "quotient", {}),
        ("Floor", [f"{name}_quotient"], "high", {}),
        ("Mul", [f"{name}_high", f"{name}_base"], "shifted", {}),
        ("Sub", [f"{name}_float", f"{name}_shifted"], "low", {}),
        ("Concat", [f"{name}_low", f"{name}_high"], "integers", {"axis": -1}),
        ("Sub", [f"{name}_integers", f"{name}_zero"], "centred", {}),
        *_shape_steps(node.input[1], name, shapes, rank),
        ("Reshape", [f"{name}_centred", f"{name}_by_group"], "grouped", {}),
        ("Gather", [f"{table}_scale", node.input[1]], "half_scale", {}),
        ("Cast", [f"{name}_half_scale"], "scale", {"to": TensorProto.FLOAT}),
        ("Mul", [f"{name}_grouped", f"{name}_scale"], "scaled", {}),
    ]
    return [
        _gather(node, f"{table}_quantized", f"{name}_bytes", name),
        *(
            helper.make_node(op, inputs, [f"{name}_{result}"], f"{name}_{result}", **attributes)
            for op, inputs, result, attributes in steps
        ),
        helper.make_node("Reshape", [f"{name}_scaled", f"{name}_by_row"], [node.output[0]], f"{name}_reshape"),
    ]


def _shape_steps(indices: str, name: str, shapes: Mapping[str, list[int]], rank: int | None) -> Steps:
    """Return the steps to the indices' shape with each of `shapes` after it: constants where the rank is known."""
    if rank is not None:  # 0 keeps a dimension
        return [("Constant", [], result, {"value_ints": [0] * rank + last}) for result, last in shapes.items()]
    steps: Steps = [("Shape", [indices], "indices", {})]
    for result, last in shapes.items():
        steps.append(("Constant", [], f"{result}_last", {"value_ints": last}))
        steps.append(("Concat", [f"{name}_indices", f"{name}_{result}_last"], result, {"axis": 0}))
    return steps


def _gather(node: NodeProto, table: str, output: str, name: str) -> NodeProto:
    gather = helper.make_node("Gather", [table, node.input[1]], [output], name)
    gather.metadata_props.extend(node.metadata_props)
    return gather
