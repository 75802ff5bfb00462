"""Store embeddings in int8: rows are gathered as integers and scaled after. Registers no technique.

ONNX Runtime's own quantizer gives a whole embedding one scale; a scale per row costs 4 bytes a row and bounds each
row's error by its own largest value.
Standard ops only, so every engine runs it: only the rows that are looked up are ever converted.

    s_V1 = max_D |w_VD| / 127,   q_VD = round(w_VD / s_V1),   out = Cast(Gather(q, ids)) * Gather(s, ids)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from omgoptim.models.onnx_graph import Layer


def quantize_rows(w: NDArray[np.float32], per_row: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 of an array (…, D) whose rows lie along its last axis.

    Returns:
        Integers (…, D) and scales: (…, 1) if `per_row`, else a single one of as many dimensions. A row of zeros has
        scale 1.
    """
    peak = np.abs(w).max(axis=-1 if per_row else None, keepdims=True)
    scales = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    return np.clip(np.rint(w / scales), -127, 127).astype(np.int8), scales


def quantize_embeddings(model: ModelProto, chosen: Sequence[Layer], per_row: bool) -> None:
    """Rewrite the chosen layers that are embeddings with a stored float32 matrix, in place; a shared one once."""
    wanted = {layer.node for layer in chosen if layer.op == "Gather"}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    stored: set[str] = set()
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        tensor = tensors.get(node.input[0]) if node.name in wanted else None
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            rewritten.append(node)
            continue
        if tensor.name not in stored:
            stored.add(tensor.name)
            values, scales = quantize_rows(numpy_helper.to_array(tensor), per_row)
            model.graph.initializer.append(numpy_helper.from_array(values, f"{tensor.name}_rows_quantized"))
            scales = scales if per_row else scales.reshape(())
            model.graph.initializer.append(numpy_helper.from_array(scales, f"{tensor.name}_rows_scale"))
        rewritten += _nodes(node, tensor.name, per_row)
    del model.graph.node[:]
    model.graph.node.extend(rewritten)


def _nodes(node: NodeProto, weight: str, per_row: bool) -> list[NodeProto]:
    name, out = f"{node.name}_quantized_rows", node.output[0]
    integers = helper.make_node("Gather", [f"{weight}_rows_quantized", node.input[1]], [f"{out}_int8"], name)
    integers.metadata_props.extend(node.metadata_props)
    cast = helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], f"{name}_cast", to=onnx.TensorProto.FLOAT)
    nodes, scale = [integers, cast], f"{weight}_rows_scale"
    if per_row:
        scale = f"{out}_scale_of_row"
        nodes.append(helper.make_node("Gather", [f"{weight}_rows_scale", node.input[1]], [scale], f"{name}_scale"))
    return [*nodes, helper.make_node("Mul", [f"{out}_float", scale], [out], f"{name}_mul")]
