"""Prepare float programs for quantization: opset, constant folding, shapes, batch norm folding.

Batch norms are folded where ONNX Runtime does not:

    a_O = scale_O / sqrt(var_O + epsilon),   w'_O = a_O w_O,   b'_O = a_O (b_O - mean_O) + shift_O

torch's exporter folds them after Conv, ConvTranspose and Linear, ONNX Runtime after Conv; a file from elsewhere may
still have one after a Gemm or a ConvTranspose. A batch norm after anything else (a ReLU) stays, in float.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from omgoptim.models.onnx_file import attribute, initializers, is_large, load, save
from omgoptim.models.onnx_graph import find_layers
from omgoptim.techniques.quantize._onnx.layer_weights import bias_of, find_layer_weights, set_bias
from omgoptim.techniques.quantize._onnx.program import as_technique_error, quiet_stdout


def fold_constants(model: ModelProto, folder: Path, threads: int) -> Path:
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
    """Convert a model to opset `minimum` if it is older."""
    if opset(model) >= minimum:
        return model
    with as_technique_error(f"the program's opset {opset(model)} cannot be raised to {minimum}"):
        return onnx.version_converter.convert_version(model, minimum)


logger = logging.getLogger(__name__)


def prepare(model: ModelProto, folder: Path) -> ModelProto:
    """Infer shapes and fold constants and batch norms; a step that fails is skipped and logged.

    Symbolic shape inference fails on some transformers ("Incomplete symbolic shape inference"); without it most models
    quantize the same.
    """
    from onnxruntime.quantization import quant_pre_process

    named, prepared = folder / "named.onnx", folder / "prepared.onnx"
    save(model, named)
    for skip_symbolic_shape in (False, True):
        try:
            with quiet_stdout():
                quant_pre_process(
                    str(named),
                    str(prepared),
                    skip_symbolic_shape=skip_symbolic_shape,
                    save_as_external_data=is_large(model),
                    all_tensors_to_one_file=True,
                    external_data_location="prepared.onnx.data",
                )
            model = load(prepared)
            break
        except Exception as error:  # noqa: BLE001  shape inference raises bare Exception; there is a way on without it
            logger.info("preparing with skip_symbolic_shape=%s failed: %s", skip_symbolic_shape, error)
    fold_batch_norms(model)
    return model


def prepare_with_shapes(model: ModelProto, folder: Path) -> ModelProto:
    """Return a float program ready for the PTQ pipeline: opset 13 or newer, folded, with the type of every tensor."""
    return infer_shapes(prepare(at_opset(model, 13), folder))


def infer_shapes(model: ModelProto) -> ModelProto:
    """Infer the type of every tensor; tensors without a type are not quantized."""
    with as_technique_error("shape inference failed on the program"):
        return onnx.shape_inference.infer_shapes(model)


def fold_batch_norms(model: ModelProto) -> int:
    """Fold every batch norm that is the only consumer of a layer's output, in place; return how many."""
    tensors = initializers(model)
    reads = Counter(name for node in model.graph.node for name in node.input)
    reads.update(value.name for value in model.graph.output)
    producers = {layer.node.output[0]: layer for layer in find_layer_weights(model, find_layers(model))}
    folded = []
    for node in model.graph.node:
        layer = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if layer is None or reads[node.input[0]] != 1 or any(name not in tensors for name in node.input[1:]):
            continue
        bias = bias_of(model, layer)
        if bias is None or any(node.output[1:]):
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(tensors[name]) for name in node.input[1:5])
        epsilon = attribute(node, "epsilon", 1e-5)  # the operator's default
        a_O = scale / np.sqrt(variance + epsilon)
        w_GOIT = layer.read()
        layer.write((w_GOIT * a_O.reshape(*w_GOIT.shape[:2], 1, 1)).astype(np.float32))
        set_bias(model, layer.node, a_O * (bias - mean) + shift)
        layer.node.output[0] = node.output[0]
        folded.append(node)
    for node in folded:
        model.graph.node.remove(node)
    return len(folded)
