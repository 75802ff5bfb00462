"""ONNX programs: run them in memory, write and copy them, and call libraries without their output or bare exceptions.

A written program has the source's inputs, outputs and module paths, and no unused data.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto

from omgoptim.errors import ModelError, NoLayerChanged, OmgoptimError, TechniqueError
from omgoptim.models.onnx_file import SCOPES, graphs, initializers, is_large, load, save
from omgoptim.models.onnx_graph import NIBBLES, OnnxLayer, find_layers, module_paths
from omgoptim.reports import Change, Skip
from omgoptim.runtimes.onnxruntime import KEEP_FLOAT_LAYERS
from omgoptim.techniques.registry import Outcome

INSERTED_SUFFIX = re.compile(r"(_MatMul)?_quant(_\w+)?$|(?<=.)_Add$")
"""Suffixes that ONNX Runtime's dynamic quantizer appends to the name of a node that it replaces."""


def open_program(model: ModelProto, threads: int, level: str = "ORT_ENABLE_ALL") -> Any:
    """Open a session on a program in memory; a program over 2 GB goes through a temporary file.

    Args:
        model: the program.
        threads: of the session.
        level: name of ONNX Runtime's graph optimization level. At `ORT_ENABLE_BASIC` and below, pairs of
            QuantizeLinear and DequantizeLinear are computed as they are written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(*KEEP_FLOAT_LAYERS)
    if level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC"):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    providers = ["CPUExecutionProvider"]
    with as_technique_error("ONNX Runtime cannot open the program"):
        if not is_large(model):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "program.onnx")
            return onnxruntime.InferenceSession(str(Path(folder) / "program.onnx"), options, providers=providers)


def has_free_batch(model: ModelProto) -> bool:
    """Return whether the first dimension of every input and output is dynamic, so that a batch can be sliced."""

    def free(value: onnx.ValueInfoProto) -> bool:
        dims = value.type.tensor_type.shape.dim
        return len(dims) > 0 and not dims[0].HasField("dim_value")

    return all(free(value) for value in (*model.graph.input, *model.graph.output))


def lacks_int8_dot_product() -> bool:
    """Return whether int8 products may saturate on this CPU, so that weights must be kept to 7 bits.

    x86 without VNNI (AVX-512 or AVX) adds pairs of products in 16 bits. Where the flags cannot be read, saturation is
    assumed.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


def weight_levels() -> int:
    """Return the largest integer of a symmetric int8 weight on this CPU, as in ONNX Runtime's quantizer."""
    return 64 if lacks_int8_dot_product() else 127


@contextlib.contextmanager
def as_technique_error(what: str, fix: str = "") -> Iterator[None]:
    """Convert any exception of a library to a TechniqueError, which is recorded as the candidate's failure."""
    try:
        yield
    except OmgoptimError:
        raise
    except Exception as error:
        raise TechniqueError(what, f"{type(error).__name__}: {error}", fix) from error


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirect descriptor 1 (C and Python) to descriptor 2 and silence Python warnings."""
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


def finish(model: ModelProto, source: ModelProto, target: Path) -> None:
    """Write a rewritten program: the source's inputs and outputs, no leftovers, valid.

    Raises:
        TechniqueError: the rewrite changed the inputs or outputs, or is not valid ONNX.
    """
    names = [[v.name for v in (*m.graph.input, *m.graph.output)] for m in (source, model)]
    if names[0] != names[1]:
        raise TechniqueError("the rewritten program changed its inputs or outputs", f"{names[1]} instead of {names[0]}")
    for values, originals in ((model.graph.input, source.graph.input), (model.graph.output, source.graph.output)):
        kept = list(originals)
        del values[:]
        values.extend(kept)
    _restore_scopes(model, source)
    del model.graph.value_info[:]  # shapes of tensors that may be gone
    _share_scales(model)
    _drop_unused(model)
    _name_layers(model)
    save(model, target)
    try:
        onnx.checker.check_model(str(target))
    except onnx.checker.ValidationError as error:
        raise TechniqueError("the rewritten program is not valid ONNX", str(error)) from error


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
            raise ModelError(f"{source} stores weights outside its folder", f"external data at '{location}'")
    shutil.copyfile(source, target)
    for location in sorted(locations):
        other = target.parent / location
        if not other.exists() or not other.samefile(source.parent / location):
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.parent / location, other)


def _restore_scopes(model: ModelProto, source: ModelProto) -> None:
    """Copy module paths to the nodes that a quantizer inserted: profiles name layers by them."""
    known: dict[str, str] = {}
    for graph in graphs(source.graph):
        for node in graph.node:
            for entry in node.metadata_props:
                if entry.key == SCOPES:
                    known.update(dict.fromkeys((node.name, *node.output), entry.value))
    for graph in graphs(model.graph):
        for node in graph.node:
            names = (node.name, *node.output, INSERTED_SUFFIX.sub("", node.name))
            scopes = next((known[name] for name in names if name in known), None)
            if scopes is not None and not any(entry.key == SCOPES for entry in node.metadata_props):
                node.metadata_props.add(key=SCOPES, value=scopes)


def _name_layers(model: ModelProto) -> None:
    """Store every node's module path in its metadata, also where it was derived from its weight's name."""
    paths = module_paths(model) | {layer.node: layer.path for layer in find_layers(model)}
    for graph in graphs(model.graph):
        for node in graph.node:
            path = paths.get(node.name)
            del node.metadata_props[:]
            if path is not None and path != node.name:
                node.metadata_props.add(key=SCOPES, value=str([path, ""]))


def _share_scales(model: ModelProto) -> None:
    """Let quantizers with equal scales or zero points read one initializer, named after the first of them.

    A quantized network has a zero point per tensor, most of them the same (1.1 % of the file of the digits example).
    """
    stored = initializers(model)
    first: dict[bytes, str] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, name in list(enumerate(node.input))[1:]:
            if name in stored:
                anonymous = TensorProto()
                anonymous.CopyFrom(stored[name])
                anonymous.name = anonymous.doc_string = ""
                node.input[place] = first.setdefault(anonymous.SerializeToString(deterministic=True), name)


def _drop_unused(model: ModelProto) -> None:
    """Remove unused initializers and domains, and the exporter's metadata.

    The metadata takes more bytes than the weights of a small program, and its stack traces hold the user's paths.
    """
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


EXCLUDED = "excluded by targets or ignore"

ALREADY_QUANTIZED = "already quantized in the source program"

EMBEDDING = "int{} weight, computed in float"

NOT_QUANTIZED = "the quantizer kept it in float"

REPLACED_SUFFIXES = ("_quant", "_MatMul_quant", "_MatMul", "_quantized_rows")
"""Suffixes that rewrites append to the name of the node they replace."""


def outcome(
    before: Sequence[OnnxLayer],
    chosen: Sequence[OnnxLayer],
    after: ModelProto,
    reasons: Mapping[str, str],
    precision: str,
    precisions: Mapping[str, str] | None = None,
) -> Outcome:
    """Compare the layers before with those of the written program.

    Args:
        before: every layer of the float program.
        chosen: those that targets and ignore leave to be quantized.
        after: the program that was written.
        reasons: op type to the reason why the quantizer leaves it in float.
        precision: what a changed layer is now, for people.
        precisions: the same by node name, of layers that are something else.
    """
    quantized = {layer.node: layer for layer in find_layers(after) if layer.is_quantized}
    names = {layer.node for layer in chosen}
    seen: set[tuple[str, str, str]] = set()
    changed: list[Change] = []
    skipped: list[Skip] = []
    for layer in before:
        if (layer.path, layer.op, layer.weight) in seen:  # a cell in a loop, unrolled: one layer, listed once
            continue
        seen.add((layer.path, layer.op, layer.weight))
        if layer.is_quantized:
            skipped.append(Skip(path=layer.path, reason=ALREADY_QUANTIZED, kind="already_compressed"))
        elif written := [quantized[n] for n in (layer.node, *_replaced(layer.node)) if n in quantized]:
            now = (precisions or {}).get(layer.node, precision)
            if layer.op == "Gather":
                now = EMBEDDING.format(4 if written[0].weight.endswith(f"{NIBBLES}_quantized") else 8)
            changed.append(Change(path=layer.path, what=layer.what, before="float32", after=now))
        elif layer.node not in names:
            skipped.append(Skip(path=layer.path, reason=EXCLUDED, kind="excluded"))
        else:
            skipped.append(Skip(path=layer.path, reason=reasons.get(layer.op, NOT_QUANTIZED), kind="unsupported"))
    return Outcome(changed, skipped)


def no_layer_left(scheme: str, before: Sequence[OnnxLayer], chosen: Sequence[OnnxLayer]) -> NoLayerChanged | None:
    """Return the error of a scheme that has no layer to quantize, else None.

    Args:
        scheme: in words: `static quantization`.
        before: every layer of the program.
        chosen: those that are float and that targets and ignore leave.
    """
    what = f"scheme {scheme} would change no layer"
    if not before:
        why, fix = "the program has no layer with weights", "use scheme fp32, which compares engines without quantizing"
        return NoLayerChanged(what, why, fix, schemes=["fp32"])
    if all(layer.is_quantized for layer in before):
        return NoLayerChanged(what, "the program is quantized already", "start from the float model")
    if not chosen:
        return NoLayerChanged(what, "targets and ignore exclude every layer", "widen targets or narrow ignore")
    return None


def _replaced(node: str) -> list[str]:
    """Return the names that a node may have after a rewrite."""
    return [node + suffix for suffix in REPLACED_SUFFIXES]
