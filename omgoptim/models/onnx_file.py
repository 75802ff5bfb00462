"""ONNX files, read and written: every node named, constants as initializers, external data. No torch.

Above protobuf's limit of a single file, the weights go to `<name>.data` beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from omgoptim.errors import ModelError
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.engine import engine_message
from omgoptim.runtimes.export import MAX_ONE_FILE_BYTES
from omgoptim.runtimes.external_data import external_data
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata in which torch's exporter keeps the module path."""


def load(path: Path, *, weights: bool = True) -> ModelProto:
    """Read an ONNX file: every node named, constants as initializers, none of them also an input.

    Args:
        path: the program; external data is searched beside it.
        weights: False leaves external data on disk, for analysis of the graph.

    Raises:
        ModelError: the file is missing, is not ONNX, or its external data is missing or outside its folder.
    """
    try:
        external_data(path)
        model = onnx.load(str(path), load_external_data=weights)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} is not a readable ONNX file", f"{type(error).__name__}: {error}") from error
    if not model.graph.node:
        raise ModelError(f"{path} is not a readable ONNX file", "its graph has no nodes")
    for graph in graphs(model.graph):
        _constants_to_initializers(graph)
        own = {tensor.name for tensor in graph.initializer}
        kept = [value for value in graph.input if value.name not in own]
        if len(kept) != len(graph.input):
            del graph.input[:]
            graph.input.extend(kept)
    _name_nodes(model)
    return model


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield the graph and, recursively, the bodies of its If, Loop and Scan nodes."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from graphs(body)


def bodies(node: NodeProto) -> list[GraphProto]:
    """Return the subgraphs of a node, as of If, Loop and Scan."""
    found = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found + [body for a in node.attribute for body in a.graphs]


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """Return the stored tensors of the main graph by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def set_values(tensor: TensorProto, values: NDArray[Any]) -> None:
    """Replace the values of a stored tensor, in place; its name stays."""
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Replace the nodes of a graph, in place; nodes of the graph may be among the new ones."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, a string as bytes; `default` where it has none."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def tensor_bytes(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's values, computed from its shape: the values need not be loaded."""
    count = 1
    for size in tensor.dims:
        count *= size
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    if tensor.data_type == TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def is_large(model: ModelProto) -> bool:
    """Return whether the model exceeds the 2 GiB limit of a single file."""
    return sum(tensor_bytes(t) for graph in graphs(model.graph) for t in graph.initializer) > MAX_ONE_FILE_BYTES


def save(model: ModelProto, target: Path) -> None:
    """Write the model, with external data if it exceeds the limit of a single file."""
    data = target.with_name(target.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    if is_large(model):
        onnx.save_model(model, str(target), save_as_external_data=True, location=data.name, size_threshold=1024)
    else:
        onnx.save_model(model, str(target))


def _constants_to_initializers(graph: GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = attribute(node, "value", None) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
    if len(kept) != len(graph.node):
        replace_nodes(graph, kept)


def _name_nodes(model: ModelProto) -> None:
    used: set[str] = set()
    for graph in graphs(model.graph):
        for index, node in enumerate(graph.node):
            name = node.name or f"{node.op_type}_{index}"
            while name in used:
                name += "_"
            node.name = name
            used.add(name)


def declared_signature(program: Path) -> Signature:
    """Return the signature that an ONNX file declares: dimensions without a fixed size are dynamic.

    Raises:
        ModelError: ONNX Runtime cannot open it, its weights lie outside its folder, or its batch is
            fixed at another number than 1.
    """
    import onnxruntime

    reason = ENGINES["onnxruntime"].missing("cpu")
    if reason:
        raise ModelError(f"{program.name} cannot be opened", reason)
    try:
        external_data(program)
        session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{program.name} cannot be opened", engine_message(error)) from error
    kinds = {"float": "float32", "double": "float64"}
    inputs = []
    for tensor in session.get_inputs():
        kind = tensor.type.removeprefix("tensor(").removesuffix(")")
        if not tensor.shape or (isinstance(tensor.shape[0], int) and tensor.shape[0] != 1):
            raise ModelError(
                f"{program.name} has no dynamic batch dimension",
                f"the first dimension of input '{tensor.name}' is {tensor.shape[0] if tensor.shape else 'missing'}; "
                "latency is measured at batch size 1, throughput and quality at others",
                "export a dynamic batch: torch.onnx.export(…, dynamic_shapes=({0: torch.export.Dim('batch')},))",
            )
        shape = [size if isinstance(size, int) else f"{tensor.name}_{axis}" for axis, size in enumerate(tensor.shape)]
        inputs.append(
            InputTensor(tensor.name, kinds.get(kind, kind), (1 if tensor.shape[0] == 1 else BATCH, *shape[1:]), False)
        )
    names = [tensor.name for tensor in session.get_outputs()]
    return Signature(tuple(inputs), "tensor" if len(names) == 1 else {"dict": dict.fromkeys(names, "tensor")})
