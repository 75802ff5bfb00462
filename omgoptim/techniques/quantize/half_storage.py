"""Store float32 weights in 16 bits behind a Cast back to float32. Registers no technique.

The Cast takes the weight's name, so that no reader of it changes, bodies of control flow included; a weight that
several layers share is stored once. Engines fold the Cast when they open the file, and compute as they are told to.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from omgoptim.models.onnx_file import graphs
from omgoptim.models.onnx_graph import layers
from omgoptim.reports import Change, Skip
from omgoptim.techniques.registry import Outcome

SMALLEST_BYTES = 1024
"""Tensors up to this size stay: a Cast node costs more than they hold."""

Half = Literal["bfloat16", "float16"]


def store_as(model: ModelProto, half: Half) -> Outcome:
    """Rewrite the model's float32 weights in place; what does not fit the 16-bit range stays and is listed."""
    paths = {weight: layer.path for layer in layers(model) for weight in layer.weights}
    changed: list[Change] = []
    skipped: list[Skip] = []
    for graph in list(graphs(model.graph)):
        casts: list[NodeProto] = []
        for tensor in list(graph.initializer):
            if tensor.data_type != TensorProto.FLOAT or _elements(tensor) * 4 <= SMALLEST_BYTES:
                continue
            path, name = paths.get(tensor.name, tensor.name.removesuffix(".weight")), tensor.name
            converted = to_half(numpy_helper.to_array(tensor), half)
            if converted is None:
                skipped.append(Skip(path=path, reason=f"holds values that overflow {half}: kept in float32"))
                continue
            casts.append(_replace(tensor, converted, half))
            what = f"weight {name} {'x'.join(str(size) for size in tensor.dims)}"
            changed.append(Change(path=path, what=what, before="float32", after=f"stored in {half}"))
        _put_first(graph, casts)
    return Outcome(changed, skipped)


def to_half(values: NDArray[np.float32], half: Half) -> NDArray[np.uint16] | None:
    """The bit patterns of `values` rounded to nearest even, any shape; None if a finite value would become infinite."""
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


def _elements(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _replace(tensor: TensorProto, bits: NDArray[np.uint16], half: Half) -> NodeProto:
    """Turn the initializer into its 16-bit form under a name of its own; the Cast that gives its old name back."""
    name = tensor.name
    stored = TensorProto(
        name=f"{name}_{half}",
        data_type=TensorProto.BFLOAT16 if half == "bfloat16" else TensorProto.FLOAT16,
        dims=list(tensor.dims),
        raw_data=bits.astype("<u2").tobytes(),
    )
    tensor.CopyFrom(stored)
    return helper.make_node("Cast", [stored.name], [name], f"{name}_to_float32", to=TensorProto.FLOAT)


def _put_first(graph: GraphProto, nodes: list[NodeProto]) -> None:
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
