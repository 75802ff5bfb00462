"""Quantize weights to int8 and, at run time, activations: Linear, MatMul, LSTM; store GRU, RNN and embeddings in int8.

What it does: a weight w becomes round(w / s), s = max|w| / 127 over an output channel; activations get an unsigned
8-bit range anew in each call, and the product is computed in integers (MatMulInteger, DynamicQuantizeLSTM). Embeddings
are stored in int8 with a scale per row, and so are the weights of GRU and RNN layers, which the engine turns back into
float when it opens the file. Constants are folded first: an exported LSTM's weights may be no constants.
Use when: the time goes into Linear or LSTM layers (transformers, recurrent nets). Needs no data and takes seconds.
What you really get: storage and memory about a quarter; more speed with VNNI for large layers, in ONNX Runtime.
The int8 of embeddings, GRU and RNN is storage only: they are computed in float, at float's speed.
Limits: convolutions stay float (ONNX Runtime's ConvInteger is slower than float: use static); an LSTM that is batch
first in the file (layout=1) is stored in int8 and computed in float; products of two activations, as in attention, stay
float.
Source: onnxruntime.quantization.quantize_dynamic; differs in folding first, in per-channel weights by default, in the
embeddings and GRU (own code, scale per row), and in proving from the written program what was quantized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from omgoptim.errors import NoLayerChanged
from omgoptim.models.onnx_file import attribute, graphs, is_large, load
from omgoptim.models.onnx_graph import CONV, OnnxLayer, find_layers, module_paths, select_layers
from omgoptim.requests.quantize import Dynamic
from omgoptim.techniques.quantize._onnx.embeddings import quantize_embeddings
from omgoptim.techniques.quantize._onnx.preparation import fold_constants
from omgoptim.techniques.quantize._onnx.program import (
    as_technique_error,
    finish,
    lacks_int8_dot_product,
    no_layer_left,
    outcome,
)
from omgoptim.techniques.quantize._onnx.weight_storage import RECURRENT, STORED_AS_INT8, store_recurrent
from omgoptim.techniques.registry import Outcome, ProgramRun, technique

CONV_REASON = "a dynamic int8 convolution is slower than float in ONNX Runtime; use scheme static (needs data)"
REASONS = {
    **dict.fromkeys(CONV, CONV_REASON),
    **dict.fromkeys(("GRU", "RNN"), "its weights are computed, not stored as constants"),
    "Gemm": "a Gemm with alpha, beta or transA set has no dynamic int8 kernel",
    "MatMul": "its second operand is not a constant weight",
    "LSTM": "its weights are computed, not stored as constants",
}


@technique(
    Dynamic,
    runtimes=("onnxruntime",),
    needs_data=False,
    source="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
    torch_precision="int8_dynamic",
)
def apply(source: Path, target: Path, params: Dynamic, run: ProgramRun) -> Outcome:
    """Read the float program `source`, write the quantized one to `target`.

    Raises:
        NoLayerChanged: nothing in it can be quantized this way, or a glob names no layer.
    """
    original = load(source)
    per_channel = params.granularity == "per_channel"
    with tempfile.TemporaryDirectory(dir=run.scratch) as scratch:
        folded = fold_constants(original, Path(scratch), run.threads)
        model = load(folded)
        before = find_layers(model, module_paths(original))
        chosen = [layer for layer in select_layers(before, params.targets, params.ignore) if not layer.is_quantized]
        quantized = _quantize(model, before, chosen, per_channel, Path(scratch))
    quantize_embeddings(quantized, chosen, per_channel, params.embedding_bits)
    remaining = [layer for layer in chosen if any(layer.node == node.name for node in quantized.graph.node)]
    store_recurrent(quantized, remaining, per_channel)
    stored = dict.fromkeys((layer.node for layer in remaining if layer.op in RECURRENT), STORED_AS_INT8)
    precision = f"int8 weight {params.granularity.replace('_', ' ')}, 8-bit activations quantized at run time"
    result = outcome(before, chosen, quantized, REASONS, precision, stored)
    if not result.changed:
        raise no_layer_left("dynamic quantization", before, chosen) or _nothing_changed(chosen)
    finish(quantized, original, target)
    return result


def _quantize(
    model: onnx.ModelProto, before: Sequence[OnnxLayer], chosen: Sequence[OnnxLayer], per_channel: bool, scratch: Path
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    taken = {layer.node for layer in chosen if layer.op in ("MatMul", "Gemm", "LSTM")} - _batch_first(model)
    kept = [layer.node for layer in before if layer.node not in taken]
    add_pre_process_metadata(model)  # it was folded: no advice to do so
    prepared, written = scratch / "prepared.onnx", scratch / "quantized.onnx"
    onnx.save_model(model, str(prepared), save_as_external_data=is_large(model), location="prepared.onnx.data")
    with as_technique_error("ONNX Runtime could not quantize the program"):
        quantize_dynamic(
            prepared,
            written,
            op_types_to_quantize=["MatMul", "LSTM"],  # a Gemm is taken apart to MatMul and Add before
            per_channel=per_channel,
            reduce_range=lacks_int8_dot_product(),
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept + [f"{name}_MatMul" for name in kept],
            use_external_data_format=is_large(model),
        )
    return load(written)


def _batch_first(model: onnx.ModelProto) -> set[str]:
    """LSTM nodes with layout=1, an attribute that the rewrite to DynamicQuantizeLSTM would lose."""
    return {
        node.name
        for graph in graphs(model.graph)
        for node in graph.node
        if node.op_type == "LSTM" and attribute(node, "layout", 0) == 1
    }


def _nothing_changed(chosen: Sequence[OnnxLayer]) -> NoLayerChanged:
    what = "dynamic quantization would change no layer"
    ops = {layer.op for layer in chosen}
    reasons = "; ".join(sorted({REASONS.get(op, op) for op in ops}))
    if ops & set(CONV):
        return NoLayerChanged(what, reasons, "use scheme static (needs data)", schemes=["static"])
    return NoLayerChanged(what, reasons, "use scheme static (needs data) or bf16", schemes=["static", "bf16"])
