"""Weight-only storage with float computation: 16-bit, int8 (recurrent layers) and packed 4-bit weights.

16 bits: a Cast back to float32 takes the weight's name, so that no reader changes, subgraphs of control flow included.
Engines fold the Cast when they open the file.

Recurrent layers: ONNX Runtime and OpenVINO have no int8 GRU or RNN. Both fold Cast and Mul of constants when they open
the file and run the float layer at its float speed. (ONNX Runtime does not fold a DequantizeLinear.)

    s = max |w| / 127 over a row of a direction's weight,   w = Cast(q) * s

Linear layers: a MatMul with a blocked DequantizeLinear, two 4-bit integers a byte. That is standard ONNX (opset 21), so
that one file serves every engine: ONNX Runtime fuses it with the product into its own MatMulNBits, OpenVINO into its
compressed product.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from omgoptim.errors import TechniqueError
from omgoptim.models.onnx_file import attribute, graphs, initializers, load, replace_nodes
from omgoptim.models.onnx_graph import OnnxLayer, find_layers
from omgoptim.reports import Change, Skip
from omgoptim.techniques.quantize._onnx.preparation import at_opset
from omgoptim.techniques.quantize._onnx.program import finish
from omgoptim.techniques.quantize._ptq.gptq import Bytes, QuantizedGroups
from omgoptim.techniques.registry import Outcome

MAX_FLOAT_BYTES = 1024
"""Maximum size of a tensor that stays float32, as the default `size_threshold` of onnx.save_model: the nodes and names
that a smaller one needs take much of what it would save."""

Half = Literal["bfloat16", "float16"]


def write_half(source: Path, target: Path, half: Half, opset: int, fix: str = "") -> Outcome:
    """Write the program `source`, raised to `opset` if it is older, with 16-bit weights to `target`.

    Raises:
        TechniqueError: no weight could be stored so; `fix` says what else can be done.
    """
    model = at_opset(load(source), opset)
    result = store_half(model, half)
    if not result.changed:
        beyond = [skip.reason for skip in result.skipped if skip.kind == "unsupported"]
        why = beyond[0] if beyond else "the program has no float32 weights over 1 KiB"
        raise TechniqueError(f"no weight can be stored in {half}", why, fix)
    finish(model, load(source), target)
    return result


def store_half(model: ModelProto, half: Half) -> Outcome:
    """Rewrite the model's float32 weights in place, but small ones and those beyond the 16-bit range."""
    paths = {weight: layer.path for layer in find_layers(model) for weight in layer.weights}
    changed: list[Change] = []
    skipped: list[Skip] = []
    for graph in list(graphs(model.graph)):
        casts: list[NodeProto] = []
        for tensor in list(graph.initializer):
            if tensor.data_type != TensorProto.FLOAT:
                continue
            size = math.prod(tensor.dims) * 4
            if size <= MAX_FLOAT_BYTES:
                if tensor.name in paths:
                    small = f"weight of {size:,} bytes: the conversion nodes would take what it saves"
                    skipped.append(Skip(path=paths[tensor.name], reason=small, kind="no_benefit"))
                continue
            path, name = paths.get(tensor.name, tensor.name.removesuffix(".weight")), tensor.name
            converted = to_half(numpy_helper.to_array(tensor), half)
            if converted is None:
                overflow = f"holds values that overflow {half}: kept in float32"
                skipped.append(Skip(path=path, reason=overflow, kind="unsupported"))
                continue
            casts.append(_replace(tensor, converted, half))
            what = f"weight {name} {'x'.join(str(size) for size in tensor.dims)}"
            changed.append(Change(path=path, what=what, before="float32", after=f"stored in {half}"))
        replace_nodes(graph, [*casts, *graph.node])
    touched = {change.path for change in changed}
    return Outcome(changed, [skip for skip in skipped if skip.kind != "no_benefit" or skip.path not in touched])


def to_half(values: NDArray[np.float32], half: Half) -> NDArray[np.uint16] | None:
    """Return the bit patterns of `values` rounded to nearest even; None if a finite value would become infinite."""
    if half == "float16":
        with np.errstate(over="ignore", under="ignore"):
            rounded = values.astype(np.float16)
        bits, back = rounded.view(np.uint16), rounded.astype(np.float32)
    else:
        wide = np.ascontiguousarray(values).view(np.uint32)
        with np.errstate(over="ignore"):
            bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
        bits = np.where(np.isnan(values), np.uint16(0x7FC0), bits).reshape(values.shape)
        back = (bits.astype(np.uint32) << 16).view(np.float32)
    return None if bool((np.isinf(back) & np.isfinite(values)).any()) else bits


def _replace(tensor: TensorProto, bits: NDArray[np.uint16], half: Half) -> NodeProto:
    """Convert an initializer to 16 bits under a new name; return the Cast node that has the old name as its output."""
    name = tensor.name
    stored = TensorProto(
        name=f"{name}_{half}",
        data_type=TensorProto.BFLOAT16 if half == "bfloat16" else TensorProto.FLOAT16,
        dims=list(tensor.dims),
        raw_data=bits.astype("<u2").tobytes(),
    )
    tensor.CopyFrom(stored)
    return helper.make_node("Cast", [stored.name], [name], f"{name}_to_float32", to=TensorProto.FLOAT)


def quantize_rows(w: NDArray[np.float32], per_row: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize an array (…, D) to symmetric int8, along its last axis.

    Returns:
        Integers (…, D) and scales: (…, 1) if `per_row`, else a single one of as many dimensions. A row of zeros has
        scale 1.
    """
    peak = np.abs(w).max(axis=-1 if per_row else None, keepdims=True)
    scales = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    return np.clip(np.rint(w / scales), -127, 127).astype(np.int8), scales


def store_rows(model: ModelProto, tensor: TensorProto, stem: str, per_row: bool) -> None:
    """Add a stored tensor's integers, and their scales, to the program under names of their own."""
    values, scales = quantize_rows(numpy_helper.to_array(tensor), per_row)
    scales = scales if per_row else scales.reshape(())
    model.graph.initializer.append(numpy_helper.from_array(values, f"{stem}_quantized"))
    model.graph.initializer.append(numpy_helper.from_array(scales, f"{stem}_scale"))


RECURRENT = ("GRU", "LSTM", "RNN")

STORED_AS_INT8 = "int8 weight on disk, computed in float"
"""Description of a recurrent layer's precision, for the report."""


def store_recurrent(model: ModelProto, chosen: Sequence[OnnxLayer], per_row: bool = True) -> None:
    """Store every float32 weight (D, gates * H, K) of the chosen recurrent layers in int8, in place.

    Biases and initial states stay; a weight that several layers share is stored once. Layers whose weights are no
    stored tensors are left, and so are layers inside of a loop's body.
    """
    selected = {layer.node for layer in chosen if layer.op in RECURRENT}
    tensors = initializers(model)
    read = [name for node in model.graph.node if node.name in selected for name in node.input[1:3]]
    added: list[NodeProto] = []
    for name in dict.fromkeys(read):
        tensor = tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 3:
            continue
        stem = f"{name}_gates"
        store_rows(model, tensor, stem, per_row)
        model.graph.initializer.remove(tensor)
        added += [
            helper.make_node("Cast", [f"{stem}_quantized"], [f"{stem}_float"], f"{stem}_cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{stem}_float", f"{stem}_scale"], [name], f"{stem}_mul"),
        ]
    replace_nodes(model.graph, [*added, *model.graph.node])


def split_gemms(model: ModelProto, nodes: Collection[str]) -> None:
    """Turn these Gemm nodes into a MatMul of the same name less a negated bias, in place, where their weight is stored.

    Not plus the bias: ONNX Runtime would make a Gemm of it again, fuse that with an activation, and then unpack the
    whole weight in every call instead of taking the packed one.
    A Gemm that transposes its input, or scales a part of the sum, stays. A weight of transB is stored transposed, a
    second time where other nodes read it as it is.
    """
    tensors = initializers(model)
    transposed: dict[str, str] = {}
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        attributes = [
            attribute(node, name, default) for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
        ]
        taken = node.op_type == "Gemm" and node.name in nodes and attributes == [1.0, 1.0, 0]
        weight = tensors.get(node.input[1]) if taken else None
        if weight is None or weight.data_type != TensorProto.FLOAT:
            rewritten.append(node)
            continue
        name = weight.name
        if attribute(node, "transB", 0):
            name = transposed.setdefault(weight.name, f"{weight.name}_Transposed")
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
            rewritten.append(_add_bias(model, tensors, product, node))
    replace_nodes(model.graph, rewritten)


def _add_bias(model: ModelProto, tensors: dict[str, TensorProto], product: NodeProto, gemm: NodeProto) -> NodeProto:
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
    selected = {layer.node for layer in chosen if layer.op in ("MatMul", "Gemm")}
    matrices = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name in selected and node.input[1] in matrices:
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
