"""Layers of an ExecuTorch program (`.pte`), read from the file: what XNNPACK computes, and in which dtype.

A delegate's blob is a header and a flatbuffer of nodes and values. Each node has a debug handle; `layers.json`, written
beside the program at export, says which module the handle comes from.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYERS = "layers.json"
"""File of the modules that the operators of a program come from."""

INT8 = ("xnn_datatype_qint8", "xnn_datatype_qcint8")
INT8_INPUTS = ("xnn_datatype_qint8", "xnn_datatype_qdint8", "xnn_datatype_qpint8")
"""XNNPACK's names of static and dynamic 8-bit activations."""


@dataclass(frozen=True, slots=True)
class PteLayer:
    """Layer of a program that a delegate computes."""

    path: str
    op: str
    """XNNPACK's operator: `FullyConnected`, `Conv2d`."""
    dtype: str
    """Storage dtype of the weight."""
    bytes: int
    """Bytes of the weight with its scales and bias."""
    computed_in: str


def lowered_layers(program: Path) -> list[PteLayer]:
    """Return the layers with weights of a program's XNNPACK delegates, one entry per module path.

    A layer with several nodes has the dtype of the least precise weight, and float32 as soon as one computes in it.
    """
    paths = json.loads(program.with_name(LAYERS).read_text(encoding="utf-8"))
    found: dict[str, PteLayer] = {}
    counted: set[tuple[str, str]] = set()
    for index, graph in enumerate(_xnnpack_graphs(program.read_bytes())):
        values = {value["id_out"]: value for value in map(_tensor, graph["xvalues"])}
        sizes = [entry["size"] for entry in graph["constant_data"]]
        keys = [entry.get("named_key") or f"{index}:{at}" for at, entry in enumerate(graph["constant_data"])]
        for node in graph["xnodes"]:
            body = node["xnode_union"]
            path = paths.get(f"{index}:{node['debug_handle']}")
            if path is None or "filter_id" not in body:
                continue
            weight = values[body["filter_id"]]
            parts = [weight["constant_buffer_idx"], weight["scales"]]
            parts += [values[body["bias_id"]]["constant_buffer_idx"]] if body.get("bias_id") in values else []
            fresh = [at for at in parts if at and (path, keys[at]) not in counted]
            counted.update((path, keys[at]) for at in fresh)
            integer = weight["datatype"] in INT8 and values[body["input1_id"]]["datatype"] in INT8_INPUTS
            layer = PteLayer(
                path,
                node["xnode_union_type"].removeprefix("XNN"),
                "int8" if weight["datatype"] in INT8 else "float32",
                sum(sizes[at] for at in fresh),
                "int8" if integer else "float32",
            )
            found[path] = layer if path not in found else _merged(found[path], layer)
    return list(found.values())


def _merged(one: PteLayer, other: PteLayer) -> PteLayer:
    dtype = "int8" if "int8" in (one.dtype, other.dtype) else "float32"
    computed = "int8" if one.computed_in == other.computed_in == "int8" else "float32"
    return PteLayer(one.path, one.op, dtype, one.bytes + other.bytes, computed)


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    """Return the flat description of a value; `scales` is the buffer of a weight's scales, 0 without one."""
    body = value["xvalue_union"]
    scales = body.get("quant_params", {}).get("scale_buffer_idx", 0)
    return {**body.get("tensor_value", body), "scales": scales if 0 < scales < 2**31 else 0}


def _program(content: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import reads a resource in a deprecated way
        from executorch.exir._serialize._program import deserialize_pte_binary

    read = deserialize_pte_binary(content)
    return getattr(read, "program", read)


def _xnnpack_graphs(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the graph of each XNNPACK delegate, in the order of the program."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    program = _program(content)
    for delegate in program.execution_plan[0].delegates:
        if delegate.id != "XnnpackBackend":
            continue
        blob = program.backend_delegate_data[delegate.processed.index].data
        header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
        begin = header.flatbuffer_offset
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "graph.bin").write_bytes(blob[begin : begin + header.flatbuffer_size])
            (folder / "schema.fbs").write_bytes(_get_schema_bytes())
            _flatc_decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
            text = (folder / "graph.json").read_text(encoding="utf-8")
        yield json.loads(re.sub(r"(?<=[:\[, ])(-?)inf\b", r"\1Infinity", text))  # bounds of activations
