"""Kernels of an engine: compute dtype of each layer, and time share of each kind.

The storage dtype of a weight is not the compute dtype: an engine that cannot fuse the quantization around a layer
unpacks the weight and computes in float. So the process that measured an artifact reports its kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from omgoptim.measure.program_layer_times import RECURRENT, GraphNode, anchor_nodes
from omgoptim.models.onnx_file import graphs
from omgoptim.reports import TimeShare
from omgoptim.runtimes.engine import Kernel

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from omgoptim.measure.measuring_process import MeasuringProcess

MOVES = ("Transpose", "Reorder", "Reshape", "Convert", "Cast", "QuantizeLinear", "DequantizeLinear")
"""Engines' operators that only move or convert, whatever layer they are named after."""

PRODUCTS = ("MatMul", "Einsum", "Attention", "MultiHeadAttention")
"""Operators that also multiply activations with each other."""

PACKED = "MatMulNBits"
"""ONNX Runtime's product with packed weights."""

INT8_LEVEL = 4
"""The accuracy level at which it rounds activations to int8: the one it sets where it fuses the product itself."""


def query_kernels(process: MeasuringProcess, batch: str) -> list[Kernel]:
    """Return the kernels of the artifact in a measuring process; called after its timing.

    Args:
        process: the process, its artifact opened.
        batch: name of a prepared batch.

    Returns:
        One entry per node of the engine; none if the engine does not report them (a GPU).
    """
    answer = process.ask("kernels", batch=batch)["kernels"]
    return [Kernel(**kernel | {"covers": tuple(kernel["covers"])}) for kernel in answer]


def compute_dtypes(kernels: Sequence[Kernel], model: ModelProto, layers: Collection[str]) -> dict[str, str]:
    """Return the compute dtype of each layer of a program.

    Args:
        kernels: what the engine runs.
        model: the program that it opened.
        layers: names of the nodes that are layers.

    Returns:
        Node name to int8, bfloat16, float16 or float32. A layer that the engine took apart is int8 only where all of
        its parts are; one that leads to none of the engine's nodes is left out.
    """
    nodes = {node.name: node for graph in graphs(model.graph) for node in graph.node}
    parts = [_part(node, name in layers) for name, node in nodes.items()]
    dtypes: dict[str, list[str]] = {}
    for kernel, part in zip(kernels, anchor_nodes(kernels, parts), strict=True):
        number = _compute_dtype(kernel, nodes[part.node]) if part is not None else None
        if part is not None and part.node in layers and number and kernel.kind not in MOVES:
            dtypes.setdefault(part.node, []).append(number)
    for part in parts:
        if part.node in layers and part.node not in dtypes:
            dtypes[part.node] = _of_all_recurrent(part.op, kernels)
    return {node: max(numbers, key=lambda number: number != "int8") for node, numbers in dtypes.items() if numbers}


def _part(node: NodeProto, is_layer: bool) -> GraphNode:
    """Convert a node for `anchor_nodes`; products of activations have work too and represent no layer before them."""
    work = int(is_layer or node.op_type in PRODUCTS)
    return GraphNode(node.name, node.op_type, node.name, tuple(filter(None, node.input)), tuple(node.output), work, {})


def _compute_dtype(kernel: Kernel, node: NodeProto) -> str | None:
    """Return the compute dtype of a node's kernel; a profile lacks the accuracy level of a packed product."""
    if kernel.kind != PACKED:
        return kernel.computed_in
    attribute_level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
    level = attribute_level if node.op_type == PACKED else INT8_LEVEL
    return "int8" if level == INT8_LEVEL else kernel.computed_in


def _of_all_recurrent(op: str, kernels: Sequence[Kernel]) -> list[str]:
    """Return the dtype that all recurrent kernels of a kind share, for nodes that the engine renamed."""
    kind = next((kind for kind in RECURRENT if op.endswith(kind)), None)
    numbers = {kernel.computed_in for kernel in kernels if kind and kernel.kind.startswith((kind, "RNNSeq"))}
    return [number for number in numbers if number] if len(numbers) == 1 else []


def query_time_shares(process: MeasuringProcess, batch: str) -> list[TimeShare]:
    """Return the time shares of the artifact in a measuring process, the costliest kind first.

    Args:
        process: the process, its artifact opened. A program is called in a second session with profiling on.
        batch: name of the prepared batch.

    Returns:
        None if the engine does not report them (a GPU).
    """
    answer = process.ask("kinds", batch=batch)["kinds"]
    return time_shares((entry["kind"], entry["ms"], entry["computed_in"]) for entry in answer)


def time_shares(nodes: Iterable[tuple[str, float, str | None]]) -> list[TimeShare]:
    """Sum the time of an engine's nodes by kind: kind, ms, and compute dtype, `int8` among them."""
    spent: dict[tuple[str, bool], float] = defaultdict(float)
    for kind, ms, numbers in nodes:
        spent[kind, numbers == "int8"] += ms
    total = sum(spent.values())
    return [
        TimeShare(kind=kind, time_ms=ms, share=ms / total, quantized=quantized)
        for (kind, quantized), ms in sorted(spent.items(), key=lambda entry: -entry[1])
        if total > 0
    ]


def speedup_bound(times: Sequence[TimeShare]) -> float | None:
    """Return Amdahl's bound: total time over the time not spent in integers. None if it does not apply."""
    integers = sum(time.share for time in times if time.quantized)
    return 1 / (1 - integers) if 0 < integers < 1 - 1e-9 else None
