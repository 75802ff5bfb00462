"""Packed weights: Linear layers as MatMul with a blocked DequantizeLinear, two 4-bit integers a byte.

Standard ONNX (opset 21), so that one file serves every engine: ONNX Runtime fuses it with the product into its own
MatMulNBits, OpenVINO into its compressed product.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.techniques.quantize._ptq.group_quantization import Bytes, QuantizedGroups


def split_gemms(model: ModelProto, nodes: Collection[str]) -> None:
    """Turn these Gemm nodes into a MatMul of the same name less a negated bias, in place, where their weight is stored.

    Not plus the bias: ONNX Runtime would make a Gemm of it again, fuse that with an activation, and then unpack the
    whole weight in every call instead of taking the packed one.
    A Gemm that transposes its input, or scales a part of the sum, stays. A transposed weight is turned; one that other
    nodes read as it is, is stored a second time.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    turned: dict[str, str] = {}
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        weight = tensors.get(node.input[1]) if node.op_type == "Gemm" and node.name in nodes and plain else None
        if weight is None or weight.data_type != TensorProto.FLOAT:
            rewritten.append(node)
            continue
        name = weight.name
        if attributes.get("transB", 0):
            name = turned.setdefault(weight.name, f"{weight.name}_Transposed")
            if name not in tensors:
                values = np.ascontiguousarray(numpy_helper.to_array(weight).T)
                tensors[name] = numpy_helper.from_array(values, name)
                model.graph.initializer.append(tensors[name])
        biased = len(node.input) > 2 and node.input[2]
        product = helper.make_node("MatMul", [node.input[0], name], [node.output[0]], node.name)
        product.metadata_props.extend(node.metadata_props)
        rewritten.append(product)
        if biased:
            product.output[0] = f"{node.output[0]}_product"
            rewritten.append(_biased(model, tensors, product, node))
    del model.graph.node[:]
    model.graph.node.extend(rewritten)


def _biased(model: ModelProto, tensors: dict[str, TensorProto], product: NodeProto, gemm: NodeProto) -> NodeProto:
    """Create the node that adds a Gemm's bias, as the subtraction of the negated one where it is stored."""
    bias, op = gemm.input[2], "Add"
    if bias in tensors:
        op, negated = "Sub", f"{bias}_negated"
        if negated not in tensors:
            tensors[negated] = numpy_helper.from_array(-numpy_helper.to_array(tensors[bias]), negated)
            model.graph.initializer.append(tensors[negated])
        bias = negated
    added = helper.make_node(op, [product.output[0], bias], [gemm.output[0]], f"{gemm.name}_Add")
    added.metadata_props.extend(gemm.metadata_props)
    return added


def stored_matmuls(model: ModelProto, chosen: Collection[OnnxLayer]) -> dict[str, list[NodeProto]]:
    """Map the float32 matrices (K, N) on the right of chosen MatMul nodes to those nodes."""
    wanted = {layer.node for layer in chosen if layer.op in ("MatMul", "Gemm")}
    matrices = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name in wanted and node.input[1] in matrices:
            found.setdefault(node.input[1], []).append(node)
    return found


OPSET = 21
"""First ONNX opset with blocked DequantizeLinear and 4-bit integers."""


def pack_nibbles(values: Bytes) -> bytes:
    """Pack integers 0 .. 15 of any shape into bytes, the first in the low half; an odd count is padded with 0."""
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, np.uint8)) & 15  # of a signed one, its low half
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def packed_tensors(groups: QuantizedGroups, name: str, num_bits: int, symmetric: bool) -> list[TensorProto]:
    """Create a layer's initializers: integers (K, N), scales (G, N) and, unless symmetric, zero points (G, N).

    Symmetric integers are signed and need no zero point: q - 2 ** (num_bits - 1).
    """
    scales = numpy_helper.from_array(groups.s_GN, f"{name}_scale")
    if symmetric:
        signed = (groups.q_KN.astype(np.int16) - 2 ** (num_bits - 1)).astype(np.int8)
        return [_tensor(f"{name}_packed", signed.view(np.uint8), num_bits, signed=True), scales]
    return [
        _tensor(f"{name}_packed", groups.q_KN, num_bits, signed=False),
        scales,
        _tensor(f"{name}_zero", groups.z_GN, num_bits, signed=False),
    ]


def unpacking_node(tensors: list[TensorProto], group_size: int, output: str, node: str) -> NodeProto:
    """Create the node that dequantizes packed tensors to a float weight."""
    return helper.make_node(
        "DequantizeLinear", [tensor.name for tensor in tensors], [output], node, axis=0, block_size=group_size
    )


def _tensor(name: str, values: NDArray[np.uint8], num_bits: int, signed: bool) -> TensorProto:
    kinds = {
        (4, False): TensorProto.UINT4,
        (4, True): TensorProto.INT4,
        (8, False): TensorProto.UINT8,
        (8, True): TensorProto.INT8,
    }
    raw = pack_nibbles(values) if num_bits == 4 else values.tobytes()
    return TensorProto(name=name, data_type=kinds[num_bits, signed], dims=values.shape, raw_data=raw)
