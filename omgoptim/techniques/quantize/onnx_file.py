"""ONNX files in and out: load, fold constants, restore what a rewrite must keep, save. Registers no technique.

A file stays one file below protobuf's limit; above it, the weights go to `<name>.data` beside it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from omgoptim.errors import ModelError, OmgoptimError, TechniqueError

ONE_FILE_BYTES = 2**31 - 2**24
"""Weights past this go beside the program: protobuf cannot hold a message of 2 GiB."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata in which torch's exporter keeps the module path."""


def load(path: Path, *, weights: bool = True) -> ModelProto:
    """Read an ONNX file: every node named, constants as initializers, none of them an input as well.

    Args:
        path: the program; external data is looked for beside it.
        weights: False leaves external data on disk, enough to look at the graph.

    Raises:
        ModelError: the file is missing, is no ONNX, or its external data is.
    """
    try:
        model = onnx.load(str(path), load_external_data=weights)
    except Exception as error:
        raise ModelError(f"{path} is no readable ONNX file", f"{type(error).__name__}: {error}") from error
    if not model.graph.node:
        raise ModelError(f"{path} is no readable ONNX file", "its graph has no nodes")
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
    """The graph and, recursively, the bodies of its If, Loop and Scan nodes."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from graphs(body)


def bodies(node: NodeProto) -> list[GraphProto]:
    found = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found + [body for a in node.attribute for body in a.graphs]


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's values, computed from its shape: the values need not be loaded."""
    count = 1
    for size in tensor.dims:
        count *= size
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    if tensor.data_type == TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def is_large(model: ModelProto) -> bool:
    """Whether the model is past what one file can hold."""
    return sum(tensor_bytes(t) for graph in graphs(model.graph) for t in graph.initializer) > ONE_FILE_BYTES


def save(model: ModelProto, target: Path) -> None:
    """Write the model, its weights beside it if they do not fit one file."""
    data = target.with_name(target.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    if is_large(model):
        onnx.save_model(model, str(target), save_as_external_data=True, location=data.name, size_threshold=1024)
    else:
        onnx.save_model(model, str(target))


def finish(model: ModelProto, source: ModelProto, target: Path) -> None:
    """Write a rewritten program: the source's inputs and outputs, no leftovers, valid.

    Raises:
        TechniqueError: the rewrite changed the inputs or outputs, or is no valid ONNX.
    """
    names = [[v.name for v in (*m.graph.input, *m.graph.output)] for m in (source, model)]
    if names[0] != names[1]:
        raise TechniqueError("the rewritten program has other inputs or outputs", f"{names[1]} instead of {names[0]}")
    for values, originals in ((model.graph.input, source.graph.input), (model.graph.output, source.graph.output)):
        kept = list(originals)
        del values[:]
        values.extend(kept)
    del model.graph.value_info[:]  # shapes of tensors that may be gone
    _drop_unused(model)
    save(model, target)
    try:
        onnx.checker.check_model(str(target))
    except onnx.checker.ValidationError as error:
        raise TechniqueError("the rewritten program is no valid ONNX", str(error)) from error


def copy(source: Path, target: Path) -> None:
    """Copy a program and the data files it names, byte for byte."""
    model = load(source, weights=False)
    locations = {
        entry.value
        for graph in graphs(model.graph)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in sorted(locations):
        if os.path.isabs(location) or ".." in Path(location).parts:
            raise ModelError(f"{source} reads weights outside its folder", f"external data at '{location}'")
    shutil.copyfile(source, target)
    for location in sorted(locations):
        other = target.parent / location
        if not other.exists() or not other.samefile(source.parent / location):
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.parent / location, other)


def fold(model: ModelProto, folder: Path, threads: int) -> Path:
    """Let ONNX Runtime fold constants and fuse what standard ops can say; node names and outputs stay.

    A dynamo-exported LSTM reads its weights out of Slice and Concat nodes; only folded are they weights to quantize.

    Returns:
        The folded program, a file in `folder`.
    """
    import onnxruntime

    named, folded = folder / "named.onnx", folder / "folded.onnx"
    save(model, named)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if is_large(model):
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.onnx.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    with as_technique_error("ONNX Runtime cannot open the program"):
        onnxruntime.InferenceSession(str(named), options, providers=["CPUExecutionProvider"])
    return folded


def opset(model: ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def at_opset(model: ModelProto, minimum: int) -> ModelProto:
    """The model at `minimum` or a later opset, converted if it is older."""
    if opset(model) >= minimum:
        return model
    with as_technique_error(f"the program's opset {opset(model)} cannot be raised to {minimum}"):
        return onnx.version_converter.convert_version(model, minimum)


def lacks_int8_dot_product() -> bool:
    """Whether int8 products may saturate on this CPU, so that weights must be kept to 7 bits.

    x86 without VNNI (AVX-512 or AVX) adds pairs of products in 16 bits. Where the flags cannot be read, it is assumed.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


@contextlib.contextmanager
def as_technique_error(what: str, fix: str = "") -> Iterator[None]:
    """Turn whatever a foreign library raises into a TechniqueError, which is a recorded candidate failure."""
    try:
        yield
    except OmgoptimError:
        raise
    except Exception as error:
        raise TechniqueError(what, f"{type(error).__name__}: {error}", fix) from error


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send everything that is written to descriptor 1, from C or Python, to descriptor 2; silence Python warnings."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # sys.stdout need not be descriptor 1
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _constants_to_initializers(graph: GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
    if len(kept) != len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _name_nodes(model: ModelProto) -> None:
    taken: set[str] = set()
    for graph in graphs(model.graph):
        for index, node in enumerate(graph.node):
            name = node.name or f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def _drop_unused(model: ModelProto) -> None:
    """Remove initializers nobody reads, domains nobody uses, and the exporter's stack traces (paths of the user's)."""
    used = {value.name for graph in graphs(model.graph) for value in graph.output}
    domains = {""}
    for graph in graphs(model.graph):
        for node in graph.node:
            used.update(node.input)
            domains.add("" if node.domain == "ai.onnx" else node.domain)
            scopes = [entry for entry in node.metadata_props if entry.key == SCOPES]
            del node.metadata_props[:]
            node.metadata_props.extend(scopes)
    for graph in graphs(model.graph):
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        if len(kept) != len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(kept)
    functions = {function.domain for function in model.functions}
    needed = [
        entry
        for entry in model.opset_import
        if ("" if entry.domain == "ai.onnx" else entry.domain) in domains | functions
    ]
    del model.opset_import[:]
    model.opset_import.extend(needed)
