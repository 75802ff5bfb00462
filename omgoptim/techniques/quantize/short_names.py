"""The names inside a program, shortened: in a small model they are more bytes than its int8 weights.

Registers no technique.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

from onnx import GraphProto, ModelProto, TensorProto

from omgoptim.models.onnx_file import SCOPES, bodies

LETTERS = string.ascii_lowercase + string.ascii_uppercase
AROUND = ("QuantizeLinear", "DequantizeLinear")
"""What stands between layers: its nodes need no names of their own."""


def shorten(model: ModelProto) -> None:
    """Give what stands around quantized layers short names, and store equal scales and zero points once.

    The program's inputs and outputs keep their names, and so do float weights and the nodes of layers. A layer whose
    module path is known by the name of its weight must have it in its node's metadata before. A program with functions
    or with bodies inside of nodes is left as it is.
    """
    graph = model.graph
    if model.functions or any(bodies(node) for node in graph.node):
        return
    scales = _scales(graph)
    _share(graph, scales)
    around = scales | {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    kept = {tensor.name for tensor in graph.initializer} - around
    fixed = {value.name for value in (*graph.input, *graph.output)} | kept
    names = (name for name in _short_names() if name not in fixed)
    short: dict[str, str] = {name: name for name in ("", *fixed)}

    def renamed(name: str) -> str:
        if name not in short:
            short[name] = next(names)
        return short[name]

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        if node.op_type in AROUND and not any(entry.key == SCOPES for entry in node.metadata_props):
            node.name = ""


def _scales(graph: GraphProto) -> set[str]:
    """Names of the constants that are read as a scale or a zero point and as nothing else."""
    read: set[str] = set()
    otherwise = {value.name for value in graph.output}
    for node in graph.node:
        around = node.op_type in AROUND
        read.update(node.input[1:] if around else [])
        otherwise.update(node.input[:1] if around else node.input)
    return (read - otherwise) & {tensor.name for tensor in graph.initializer}


def _share(graph: GraphProto, names: set[str]) -> None:
    """One constant for all of these that are of equal type, shape and values, where the values lie in the file."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), bytes(tensor.raw_data))
        inside = tensor.name in names and tensor.raw_data and tensor.data_location != TensorProto.EXTERNAL
        if inside and first.setdefault(key, tensor.name) != tensor.name:
            same[tensor.name] = first[key]
        else:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]


def _short_names() -> Iterator[str]:
    """a, b, … Z, aa, ab, …: no two alike."""
    names = [""]
    while True:
        names = [name + letter for name in names for letter in LETTERS]
        yield from names
