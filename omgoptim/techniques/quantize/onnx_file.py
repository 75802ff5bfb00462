"""Rewriting ONNX files: fold constants, restore what a rewrite must keep, copy. Registers no technique."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import ModelProto

from omgoptim.errors import ModelError, OmgoptimError, TechniqueError
from omgoptim.models.onnx_file import SCOPES, graphs, is_large, load, save
from omgoptim.models.onnx_graph import layers, module_paths
from omgoptim.techniques.quantize.short_names import shorten

REPLACED = re.compile(r"(_MatMul)?_quant(_\w+)?$|(?<=.)_Add$")
"""What ONNX Runtime's dynamic quantizer appends to the name of a node that it replaces."""


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
    _restore_scopes(model, source)
    del model.graph.value_info[:]  # shapes of tensors that may be gone
    _drop_unused(model)
    _name_layers(model)
    shorten(model)
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


def weight_levels() -> int:
    """The largest integer of a symmetric int8 weight on this CPU, as ONNX Runtime's writer has it."""
    return 64 if lacks_int8_dot_product() else 127


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


def _restore_scopes(model: ModelProto, source: ModelProto) -> None:
    """Give nodes that a quantizer put in place of others the module paths of those: a profile names layers by them."""
    known: dict[str, str] = {}
    for graph in graphs(source.graph):
        for node in graph.node:
            for entry in node.metadata_props:
                if entry.key == SCOPES:
                    known.update(dict.fromkeys((node.name, *node.output), entry.value))
    for graph in graphs(model.graph):
        for node in graph.node:
            names = (node.name, *node.output, REPLACED.sub("", node.name))
            scopes = next((known[name] for name in names if name in known), None)
            if scopes is not None and not any(entry.key == SCOPES for entry in node.metadata_props):
                node.metadata_props.add(key=SCOPES, value=scopes)


def _name_layers(model: ModelProto) -> None:
    """Let every node say its own module path, and no more: that of a layer may have been known by its weight's name."""
    paths = module_paths(model) | {layer.node: layer.path for layer in layers(model)}
    for graph in graphs(model.graph):
        for node in graph.node:
            path = paths.get(node.name)
            del node.metadata_props[:]
            if path is not None and path != node.name:
                node.metadata_props.add(key=SCOPES, value=str([path, ""]))


def _drop_unused(model: ModelProto) -> None:
    """Remove initializers nobody reads, domains nobody uses, the exporter's notes on the program, which are more bytes
    than the weights of a small one, and its stack traces (paths of the user's)."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    for graph in graphs(model.graph):
        del graph.metadata_props[:]
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
