"""Profile of an engine by node: slowest layers, compute dtype of each layer, time share of each kind of node.

An engine fuses nodes and renames them. The nodes that it reports as fused, or the name, lead to a node of the file and
to its module path, if torch's exporter wrote one; else the node's own name is the path.

The storage dtype of a weight is not the compute dtype: an engine that cannot fuse the quantization around a layer
unpacks the weight and computes in float. So the process that measured an artifact reports its kernels.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.models.manifest import PROGRAM, Manifest
from omgoptim.models.onnx_file import graphs
from omgoptim.reports import Layer, TimeShare
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.engine import Kernel, NodeTime, NumpyBatch

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from omgoptim.measure.measuring_process import MeasuringProcess


ENGINE_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_quant|/\w*Fusion\w*/?|/WithoutBiases|/DequantizationMultiply)$")
"""Suffixes that engines append to the name of a node, or of its output, when they rewrite it."""

WITH_PRODUCTS = ("conv", "gemm", "matmul", "fullyconnected", "attention")
"""Parts of the names of engines' operators that hold a product, whatever was fused into it."""

RECURRENT = ("LSTM", "GRU", "RNN")
"""Recurrent operators of ONNX, with which the names of engines' own begin."""

EngineNode = NodeTime | Kernel
"""A node of the engine, with its time or with its kernel."""


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A node of the file."""

    node: str
    op: str
    path: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int | None
    weights: dict[str, int]
    """The stored tensors it reads, to their bytes."""


def query_layers(
    process: MeasuringProcess, batch: str, sample: NumpyBatch, macs_by_path: Mapping[str, int], top: int
) -> list[Layer]:
    """Return the slowest layers of the artifact in a measuring process, for any engine.

    Args:
        process: the process, its artifact opened.
        batch: name of the prepared batch of one sample.
        sample: the same sample by input name.
        macs_by_path: `MacsCount.by_path` of a module; a program's are counted from its file.
        top: how many to give.
    """
    if ENGINES[Manifest.read(process.artifact).runtime].runs == "module":
        answer = process.ask("layers", batch=batch, macs_by_path=dict(macs_by_path), top=top)
        return [Layer.model_validate(record) for record in answer["layers"]]
    times = [
        NodeTime(**record | {"covers": tuple(record["covers"])})
        for record in process.ask("nodes", batch=batch)["nodes"]
    ]
    return costliest_nodes(times, graph_nodes(process.artifact / PROGRAM, sample), top)


def graph_nodes(program: Path, sample: NumpyBatch) -> list[GraphNode]:
    """Return the nodes of an ONNX file with their paths, multiply-accumulates and weights. Imports onnx."""
    from omgoptim.measure.program_macs import count_program
    from omgoptim.models.onnx_file import load, tensor_bytes
    from omgoptim.models.onnx_graph import PARAMETER_TYPES, constant_roots, find_layers, module_paths

    model = load(program, weights=False)
    counted = count_program(program, sample)
    roots = constant_roots(model.graph)
    stored = {t.name: tensor_bytes(t) for t in model.graph.initializer if t.data_type in PARAMETER_TYPES and t.dims}
    paths = module_paths(model) | {layer.node: layer.path for layer in find_layers(model)}
    found = [
        GraphNode(
            node=node.name,
            op=node.op_type,
            path=next((paths[name] for name in (node.name, *node.output) if name in paths), ""),
            inputs=tuple(name for name in node.input if name),
            outputs=tuple(name for name in node.output if name),
            macs=None if counted.macs is None else counted.by_node.get(node.name, 0),
            weights={root: stored[root] for name in node.input for root in roots.get(name, ()) if root in stored},
        )
        for node in model.graph.node
    ]
    readers: dict[str, GraphNode] = {}
    for part in found:
        for name in part.inputs:
            readers.setdefault(name, part)
    return [dataclasses.replace(part, path=part.path or _readers_path(part, roots, readers)) for part in found]


def _readers_path(part: GraphNode, constants: Mapping[str, Any], readers: Mapping[str, GraphNode]) -> str:
    """Return the path of the layer that reads a weight's preparation; else the node's name."""
    reader: GraphNode | None = part
    while reader is not None and not reader.path and reader.outputs and reader.outputs[0] in constants:
        reader = readers.get(reader.outputs[0])
    return (reader.path if reader else "") or part.node


def costliest_nodes(times: Sequence[NodeTime], parts: Sequence[GraphNode], top: int = 10) -> list[Layer]:
    """Return the slowest layers.

    Args:
        times: what the engine's nodes take.
        parts: the nodes of the file.
        top: how many layers to give.

    Returns:
        One `Layer` per path, the slowest first: the sum of its nodes' medians, its share of the sum of all, the
        multiply-accumulates and weights of all nodes of that path, and as its kind the engine's operators that take the
        most of it. An engine's node that leads to no node of the file stands for itself.
    """
    anchored = anchor_nodes(times, parts)
    spent: dict[str, float] = defaultdict(float)
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for time, anchor in zip(times, anchored, strict=True):
        path = anchor.path if anchor else time.name
        spent[path] += time.ms
        kinds[path][time.kind] += time.ms
    of_path: dict[str, list[GraphNode]] = defaultdict(list)
    for part in parts:
        of_path[part.path].append(part)
    total = sum(spent.values())
    return [
        Layer(
            path=path,
            kind=" + ".join(sorted(kinds[path], key=lambda kind: -kinds[path][kind])[:2]),
            time_ms=spent[path],
            time_share=spent[path] / total if total > 0 else None,
            macs=_sum(part.macs for part in of_path[path]) if of_path[path] else None,
            size_bytes=sum({k: v for part in of_path[path] for k, v in part.weights.items()}.values())
            if of_path[path]
            else None,
        )
        for path in sorted(spent, key=lambda path: -spent[path])[:top]
    ]


def _sum(counts: Iterable[int | None]) -> int | None:
    counts_known = list(counts)
    return None if None in counts_known else sum(count or 0 for count in counts_known)


def anchor_nodes(times: Sequence[EngineNode], parts: Sequence[GraphNode]) -> list[GraphNode | None]:
    """Map each of the engine's nodes to the node of the file that it represents."""
    by_name = {part.node: part for part in parts}
    by_output = {name: part for part in parts for name in part.outputs}
    named = [_named(time, by_name, by_output) for time in times]
    claimed = {part.node for nodes in named for part in nodes}
    found: list[GraphNode | None] = []
    for time, nodes in zip(times, named, strict=True):
        anchor = max(nodes, key=lambda part: part.macs or 0, default=None)
        if anchor is None:
            anchor = _only_recurrent(time, parts)
        elif not anchor.macs and any(word in time.kind.lower() for word in WITH_PRODUCTS):
            anchor = _product_behind(anchor, by_output, claimed) or anchor
        found.append(anchor)
    return found


def _named(time: EngineNode, by_name: Mapping[str, GraphNode], by_output: Mapping[str, GraphNode]) -> list[GraphNode]:
    found = []
    for name in (time.name.removeprefix("fused "), *time.covers):
        part = by_name.get(name) or by_output.get(name)
        while part is None and (end := ENGINE_SUFFIX.search(name)):
            name = name[: end.start()]
            part = by_name.get(name) or by_output.get(name)
        if part is not None:
            found.append(part)
    return found


def _product_behind(part: GraphNode, by_output: Mapping[str, GraphNode], claimed: set[str]) -> GraphNode | None:
    """Find the product at the start of a fusion named after its last operation (an activation, an addition)."""
    waiting, seen = [part], {part.node}
    while waiting:
        for name in waiting.pop(0).inputs:
            before = by_output.get(name)
            if before is None or before.node in seen or before.node in claimed:
                continue
            if before.macs:
                return before
            seen.add(before.node)
            waiting.append(before)
    return None


def _only_recurrent(time: EngineNode, parts: Sequence[GraphNode]) -> GraphNode | None:
    """Match a recurrent node that OpenVINO renamed, if one layer of that kind exists."""
    kind = next((kind for kind in RECURRENT if time.kind.startswith(kind)), None)
    found = [part for part in parts if kind and part.op.endswith(kind)]
    return found[0] if len({part.path for part in found}) == 1 else None


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
