"""Size of a model: its parameters, and the storage dtype and bytes of each layer's weights."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.models.manifest import RECIPE, WEIGHTS

if TYPE_CHECKING:
    import torch
    from onnx import ModelProto, NodeProto, TensorProto
    from torch import nn

    from omgoptim.models.onnx_graph import OnnxLayer

ONNX_NAMES = {"float": "float32", "double": "float64"}
"""ONNX's names of types where they are not numpy's."""

SAFETENSORS_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
}
"""Dtype names of safetensors, to torch's."""

FOLLOWED = ("Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze")
"""Ops that may be between an integer weight and its scale."""

PACKED = ("MatMulNBits", "GatherBlockQuantized")
"""Operators that read packed weights, their scales and zero points."""


def count_params(module: nn.Module) -> tuple[int, int]:
    """Count the parameters and the non-zero ones; a weight that several layers share counts once."""
    distinct = {_identity(parameter): parameter for parameter in module.parameters()}.values()
    return sum(p.numel() for p in distinct), sum(int((p.detach() != 0).sum()) for p in distinct)


def stored_precision(module: nn.Module) -> tuple[str, dict[str, int]]:
    """Return the floating dtype of most of a module's bytes, and the bytes of each; float32 without weights."""
    weights = {_identity(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
    stored: dict[str, int] = {}
    for tensor in weights:
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            stored[name] = stored.get(name, 0) + tensor.numel() * tensor.element_size()
    return max(stored, key=lambda name: stored[name], default="float32"), stored


def _identity(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return address, shape and stride of a tensor; the object's id if it has no memory (empty or meta)."""
    address = parameter.data_ptr()
    return (address, *parameter.shape, *parameter.stride()) if address else (id(parameter),)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Stored weights of a layer."""

    path: str
    op: str
    """The operator, or the module's class."""
    nodes: tuple[str, ...]
    """The program's nodes that read them; none of a module."""
    shape: tuple[int, ...]
    """Shape of the largest weight."""
    dtype: str
    """Dtype of the largest weight."""
    tensors: Mapping[str, int]
    """The weights, scales and zero points by name, to their bytes."""

    @property
    def bytes(self) -> int:
        """Bytes of the layer's stored tensors."""
        return sum(self.tensors.values())


def stored_layers(model: ModelProto, paths: Mapping[str, str] | None = None) -> list[StoredWeights]:
    """Return the layers of a program by path, in the order of the program.

    Args:
        model: the program; its external data need not be loaded.
        paths: node or output name to module path, if the program is a rewrite without them.
    """
    from omgoptim.models.onnx_file import graphs, tensor_bytes
    from omgoptim.models.onnx_graph import FLOAT_TYPES, find_layers

    by_path: dict[str, list[OnnxLayer]] = defaultdict(list)
    for layer in find_layers(model, paths):
        by_path[layer.path].append(layer)
    nodes = {node.name: node for graph in graphs(model.graph) for node in graph.node}
    tensors = {tensor.name: tensor for graph in graphs(model.graph) for tensor in graph.initializer}
    follow = _Scales(model)
    found = []
    for path, layers in by_path.items():
        largest = max(layers, key=lambda layer: tensor_bytes(tensors[layer.weight]))
        weights = dict.fromkeys(name for layer in layers for name in layer.weights)
        scales = [
            scale
            for name in weights
            if tensors[name].data_type not in FLOAT_TYPES
            for scale in follow.of(name)
            if scale in tensors
        ]
        found.append(
            StoredWeights(
                path=path,
                op=largest.op,
                nodes=tuple(layer.node for layer in layers),
                shape=largest.shape,
                dtype=_dtype(nodes[largest.node], tensors[largest.weight]),
                tensors={name: tensor_bytes(tensors[name]) for name in dict.fromkeys((*weights, *scales))},
            )
        )
    return found


def module_layers(module: nn.Module) -> list[StoredWeights]:
    """Return the layers of a module: modules with a parameter of their own of two dimensions or more."""
    names: dict[int, str] = {}
    found = []
    for path, layer in module.named_modules():
        matrices = {
            names.setdefault(id(parameter), f"{path}.{name}" if path else name): parameter
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter.dim() > 1 and parameter.is_floating_point()
        }
        if matrices:
            largest = max(matrices.values(), key=lambda parameter: parameter.numel())
            found.append(
                StoredWeights(
                    path=path,
                    op=type(layer).__name__,
                    nodes=(),
                    shape=tuple(largest.shape),
                    dtype=str(largest.dtype).removeprefix("torch."),
                    tensors={name: value.numel() * value.element_size() for name, value in matrices.items()},
                )
            )
    return found


def saved_layers(folder: Path, before: Sequence[StoredWeights]) -> list[StoredWeights]:
    """Return the layers of a module's artifact from the header of its weights file, without absent ones.

    Args:
        folder: the artifact.
        before: the layers of the float module.
    """
    header = _header(folder / WEIGHTS)
    aliases: dict[str, str] = json.loads((folder / RECIPE).read_text())["aliases"]
    found = []
    for layer in before:
        entries = {key: header[key] for name in layer.tensors for key in _keys_of(name, aliases) if key in header}
        if entries:
            largest = max(entries.values(), key=_entry_bytes)
            found.append(
                StoredWeights(
                    path=layer.path,
                    op=layer.op,
                    nodes=(),
                    shape=layer.shape,
                    dtype=SAFETENSORS_NAMES.get(largest["dtype"], largest["dtype"]),
                    tensors={name: _entry_bytes(entry) for name, entry in entries.items()},
                )
            )
    return found


class _Scales:
    """Finder of the scales and zero points of an integer weight."""

    def __init__(self, model: ModelProto) -> None:
        from omgoptim.models.onnx_file import graphs
        from omgoptim.models.onnx_graph import constant_roots

        self._roots = constant_roots(model.graph)
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        self._makers: dict[str, NodeProto] = {}
        for graph in graphs(model.graph):
            for node in graph.node:
                for name in dict.fromkeys(node.input):
                    self._readers[name].append(node)
                self._makers.update(dict.fromkeys(node.output, node))

    def of(self, weight: str) -> Iterator[str]:
        """Yield names of stored tensors, possibly repeated."""
        from omgoptim.models.onnx_graph import SCALE_INPUTS

        queue, visited = [weight], {weight, ""}
        while queue:
            name = queue.pop()
            for node in self._readers[name]:
                if node.op_type == "Mul":
                    yield from self._other_factors(node, name)
                    continue
                beside = range(2, 4) if node.op_type in PACKED else SCALE_INPUTS.get(node.op_type, ())
                if name == weight and node.op_type not in ("QuantizeLinear", "QLinearConv", "QLinearMatMul"):
                    yield from (node.input[at] for at in beside if at < len(node.input))
                elif name == weight:  # of a product in integers: not those of its activations
                    yield from (node.input[at] for at in (4, 5) if at < len(node.input))
                if node.op_type in FOLLOWED or (
                    name == weight and node.op_type in ("MatMulInteger", "ConvInteger", "Gather")
                ):
                    fresh = [output for output in node.output if output not in visited]
                    visited.update(fresh)
                    queue += fresh

    def _other_factors(self, node: NodeProto, name: str) -> Iterator[str]:
        """Yield the constant factors of a product, and those multiplied or looked up by something else."""
        for factor in node.input:
            if factor == name:
                continue
            maker = self._makers.get(factor)
            sources = [factor] if factor in self._roots or maker is None else maker.input
            for source in sources:
                yield from self._roots.get(source, ())


def _dtype(node: NodeProto, tensor: TensorProto) -> str:
    import onnx

    if node.op_type in PACKED:
        return f"int{next((a.i for a in node.attribute if a.name == 'bits'), 4)}"
    name: str = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return ONNX_NAMES.get(name, name)


def _keys_of(name: str, aliases: Mapping[str, str]) -> list[str]:
    """Return a parameter's entries in a weights file: itself, or its packed parts."""
    stored_name = aliases.get(name, name)
    parts = [f"{name}.{part}" for part in ("int8", "scale", "zero_point")]
    return [stored_name, f"{stored_name}.mask", f"{stored_name}.values", *(aliases.get(part, part) for part in parts)]


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Read a safetensors header: name to dtype, shape and place; its first eight bytes are its length."""
    with path.open("rb") as file:
        table: dict[str, dict[str, Any]] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    table.pop("__metadata__", None)
    return table


def _entry_bytes(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)
