"""Store the weights of Linear layers in 4 or 8 bits, in groups that share a scale; compute with float weights.

What it does: each run of `group_size` weights of an output channel becomes integers with a scale (and a zero point
unless symmetric), w ~ (q - z) * s, packed: two 4-bit integers a byte. The range of a group is searched for the least
squared error. With calibration data, GPTQ minimizes the error of the layer's output: it rounds input by input and
compensates each error in the remaining ones. It is kept where held-out samples agree that it is better. Embeddings
and recurrent weights are stored in int8 with a scale per row.
Use when: bytes decide (a download, a small disk, memory) and the weights are in Linear layers. Takes seconds without
data; a little longer with it.
What you really get: storage, about a seventh (4 bits) or less than a third (8 bits) of the Linear layers' bytes, on
ONNX Runtime and OpenVINO from one file. Weights are dequantized at run time: smaller, often not faster; for one sample
at a time a layer bound by memory bandwidth can be faster, and the measured speed says which.
Limits: convolutions stay; a layer whose number of inputs is not divisible by 16 stays in float; ONNX Runtime's fused
product also rounds activations to 8 bits, a block at a time.
Source: arXiv:2210.17323 (GPTQ); the format is ONNX opset 21 (blocked DequantizeLinear). Differs in the searched ranges
(`_ptq/gptq.py`) and in the check on held-out samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from omgoptim.errors import NoLayerChanged
from omgoptim.models.onnx_file import initializers, load, replace_nodes
from omgoptim.models.onnx_graph import CONV, OnnxLayer, find_layers, module_paths, select_layers
from omgoptim.requests.quantize import WeightOnly
from omgoptim.techniques.quantize._onnx.embeddings import quantize_embeddings
from omgoptim.techniques.quantize._onnx.preparation import at_opset, fold_constants
from omgoptim.techniques.quantize._onnx.program import finish, has_free_batch, no_layer_left, outcome
from omgoptim.techniques.quantize._onnx.weight_storage import (
    MAX_FLOAT_BYTES,
    OPSET,
    RECURRENT,
    STORED_AS_INT8,
    packed_tensors,
    split_gemms,
    store_recurrent,
    stored_matmuls,
    unpacking_node,
)
from omgoptim.techniques.quantize._ptq.calibration import batches_for, split
from omgoptim.techniques.quantize._ptq.gptq import (
    Float,
    Hessians,
    QuantizedGroups,
    gptq_quantize,
    input_hessians,
    output_error,
    quantize_groups,
)
from omgoptim.techniques.registry import Outcome, ProgramRun, technique

MIN_GROUP_SIZE = 16
"""Smallest group size of ONNX Runtime's MatMulNBits (docs/ContribOperators.md: a power of 2, 16 at least)."""

MAX_GPTQ_INPUTS = 4096
"""Maximum inputs of a layer for GPTQ. Chosen: a Hessian of 67 MB, and some 70 billion operations for its inverse."""

SAMPLES = 64
"""Calibration samples that moments are collected from, half of them to fit to and half to judge by: MiniLM in int4 has
a mean cosine of 0.985 with them, 0.967 without data (CONTRIBUTING.md)."""

SPEED_NOTE = "Weights are dequantized at run time: the file is smaller, but inference is often not faster."
REASONS = {
    **dict.fromkeys(CONV, "weight_only quantizes Linear layers; scheme static (needs data) quantizes convolutions"),
    **dict.fromkeys(
        ("MatMul", "Gemm"),
        "its weight is not a constant matrix, is small, or has no group size of 16 or more that divides its inputs",
    ),
}


@technique(
    WeightOnly,
    runtimes=("onnxruntime", "openvino"),
    needs_data=False,
    source="arXiv:2210.17323",
)
def apply(source: Path, target: Path, params: WeightOnly, run: ProgramRun) -> Outcome:
    """Read the float program `source`, write the packed one to `target`.

    Raises:
        NoLayerChanged: nothing in it can be packed, or a glob names no layer.
        DataError: the calibration data holds NaN.
    """
    original = load(source)
    with tempfile.TemporaryDirectory(dir=run.scratch) as scratch:
        model = at_opset(load(fold_constants(original, Path(scratch), run.threads)), OPSET)
        before = find_layers(model, module_paths(original))
        chosen = [layer for layer in select_layers(before, params.targets, params.ignore) if not layer.is_quantized]
        split_gemms(model, {layer.node for layer in chosen})
        sizes = _group_sizes(model, chosen, params.group_size)
        fitted, held_out = _input_hessians(model, chosen, sizes, run)
    precisions, improved = _pack(model, chosen, sizes, params, fitted, held_out)
    quantize_embeddings(model, chosen, per_row=True, num_bits=params.embedding_bits)
    store_recurrent(model, chosen)
    precisions |= {layer.node: STORED_AS_INT8 for layer in chosen if layer.op in RECURRENT}
    result = outcome(before, chosen, model, REASONS, f"int{params.num_bits} weight", precisions)
    if not result.changed:
        raise no_layer_left("weight-only quantization", before, chosen) or _nothing_changed(chosen)
    finish(model, original, target)
    notes = [SPEED_NOTE]
    if fitted:
        notes.append(f"GPTQ was used for {improved} of {len(sizes)} packed weights.")
    return Outcome(result.changed, result.skipped, notes)


def _group_sizes(model: ModelProto, chosen: Sequence[OnnxLayer], largest: int) -> dict[str, int]:
    """Map the matrices to pack to the largest group size, up to the requested one, that divides their inputs."""
    tensors = initializers(model)
    sizes: dict[str, int] = {}
    for name in stored_matmuls(model, chosen):
        inputs, outputs = tensors[name].dims
        fits = [size for size in (256, 128, 64, 32, 16) if MIN_GROUP_SIZE <= size <= largest and inputs % size == 0]
        if fits and 4 * inputs * outputs > MAX_FLOAT_BYTES:
            sizes[name] = fits[0]
    return sizes


def _input_hessians(
    model: ModelProto, chosen: Sequence[OnnxLayer], sizes: Mapping[str, int], run: ProgramRun
) -> tuple[Hessians, Hessians]:
    """Return the Hessians of the inputs of each packed weight, to fit on and to choose by; empty without data."""
    if not run.calibration or not sizes:
        return {}, {}
    readers = {name: nodes for name, nodes in stored_matmuls(model, chosen).items() if name in sizes}
    input_sizes = {
        t.name: t.dims[0] for t in model.graph.initializer if t.name in readers and t.dims[0] <= MAX_GPTQ_INPUTS
    }
    widths = {
        node.input[0]: input_sizes[name] for name, nodes in readers.items() if name in input_sizes for node in nodes
    }
    parts = split(batches_for(model, run, SAMPLES), 2, sliceable=has_free_batch(model))
    split_hessians = [input_hessians(model, widths, part, run.threads) for part in parts]
    by_weight = [
        {
            name: np.asarray(sum(hessians[node.input[0]] for node in nodes), np.float32)
            for name, nodes in readers.items()
            if name in input_sizes
        }
        for hessians in split_hessians
    ]
    return by_weight[0], by_weight[-1]


def _pack(
    model: ModelProto,
    chosen: Sequence[OnnxLayer],
    sizes: Mapping[str, int],
    params: WeightOnly,
    fitted: Hessians,
    held_out: Hessians,
) -> tuple[dict[str, str], int]:
    """Replace the matrices in place.

    Each is stored once and dequantized for each reader by a node of its own, so that an engine can fuse the two.

    Returns:
        Node name to what its weight is now, and how many matrices are rounded with the data.
    """
    tensors = initializers(model)
    precisions: dict[str, str] = {}
    before: dict[str, NodeProto] = {}
    improved = 0
    for name, readers in stored_matmuls(model, chosen).items():
        if name not in sizes:
            continue
        w_KN, size = numpy_helper.to_array(tensors[name]).astype(np.float32), sizes[name]
        groups, better = _quantize_weight(w_KN, size, params, fitted.get(name), held_out.get(name))
        improved += better
        packed = packed_tensors(groups, name, params.num_bits, params.symmetric)
        model.graph.initializer.extend(packed)
        for index, node in enumerate(readers):
            unpacking = unpacking_node(packed, size, f"{name}_unpacked_{index}", f"{node.name}_unpack")
            unpacking.metadata_props.extend(node.metadata_props)
            before[node.name] = unpacking
            node.input[1] = unpacking.output[0]
            precisions[node.name] = f"int{params.num_bits} weight in groups of {size}, dequantized at run time"
    nodes = (each for node in model.graph.node for each in (before.get(node.name), node) if each is not None)
    replace_nodes(model.graph, nodes)
    return precisions, improved


def _quantize_weight(
    w_KN: Float, size: int, params: WeightOnly, fitted_KK: Float | None, held_out_KK: Float | None
) -> tuple[QuantizedGroups, bool]:
    """Quantize by GPTQ or round to nearest, whichever is better on held-out samples; whether it was GPTQ."""
    if fitted_KK is None or held_out_KK is None:
        return quantize_groups(w_KN, size, params.num_bits, params.symmetric), False
    nearest = quantize_groups(w_KN, size, params.num_bits, params.symmetric, np.diagonal(fitted_KK) + np.float32(1e-12))
    try:
        gptq = gptq_quantize(w_KN, fitted_KK, size, params.num_bits, params.symmetric)
    except np.linalg.LinAlgError:
        return nearest, False
    better = output_error(w_KN, gptq, held_out_KK) < output_error(w_KN, nearest, held_out_KK)
    return (gptq if better else nearest), better


def _nothing_changed(chosen: Sequence[OnnxLayer]) -> NoLayerChanged:
    what = "weight-only quantization would change no layer"
    reasons = "; ".join(sorted({REASONS.get(layer.op, layer.op) for layer in chosen}))
    if {layer.op for layer in chosen} & set(CONV):
        fix = "use scheme static (needs data), which quantizes convolutions, or bf16"
        return NoLayerChanged(what, reasons, fix, schemes=["static", "bf16"])
    fix = "use a smaller group_size, or scheme dynamic or bf16"
    return NoLayerChanged(what, reasons, fix, schemes=["dynamic", "bf16"])
