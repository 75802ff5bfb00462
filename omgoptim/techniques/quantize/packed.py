"""Write grouped weights into a program: a blocked DequantizeLinear, two 4-bit integers a byte. Registers no technique.

Standard ONNX (opset 21), so that one file serves every engine: ONNX Runtime fuses it with the product into its own
MatMulNBits, OpenVINO into its compressed product.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from omgoptim.techniques.quantize.group_rounding import Bytes, Groups

OPSET = 21
"""The first with blocks and 4-bit integers."""


def pack_nibbles(values: Bytes) -> bytes:
    """Integers 0 .. 15 of any shape, in order, the first in the low half of a byte; an odd count ends with a 0."""
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, np.uint8)) & 15  # of a signed one, its low half
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def packed_tensors(groups: Groups, name: str, num_bits: int, symmetric: bool) -> list[TensorProto]:
    """What a layer stores: integers (K, N), scales (G, N) and, unless symmetric, zero points (G, N).

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


def unpacked(tensors: list[TensorProto], group_size: int, output: str, node: str) -> NodeProto:
    """The node that makes a float weight of them."""
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
