"""Static quantization by a library: ONNX Runtime's QDQ writer with the PTQ pipeline, or NNCF.

NNCF brings its own bias correction, and SmoothQuant for transformers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from omgoptim.errors import SetupError
from omgoptim.models.onnx_file import attribute, is_large, load, replace_nodes, save
from omgoptim.models.onnx_graph import OnnxLayer, find_layers, has_attention
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx import preparation
from omgoptim.techniques.quantize._onnx.program import as_technique_error, lacks_int8_dot_product, quiet_stdout
from omgoptim.techniques.quantize._ptq import pipeline
from omgoptim.techniques.quantize._ptq.calibration import Batch
from omgoptim.techniques.quantize._ptq.state import PtqTask


def quantize_by_onnxruntime(
    model: ModelProto,
    batches: Sequence[Batch],
    task: PtqTask,
    folder: Path,
    float_layers: list[OnnxLayer] | None = None,
) -> tuple[ModelProto, list[str]]:
    """Quantize the chosen layers of a prepared model and what lies between them.

    Activations are unsigned with a zero point, or signed without one if `params.symmetric`; weights are signed int8.
    Embeddings are left to `_onnx/embeddings.py`. A program past what protobuf holds in memory gets plain ranges.

    Args:
        model: the prepared float program.
        batches: calibration inputs by name.
        task: layers, number format and threads.
        folder: an existing folder for the writer's files.
        float_layers: takes the chosen layers that stay in float.

    Returns:
        The QDQ program, and what was done, a sentence each.
    """
    if is_large(model):
        quantized = _quantize_large(model, task.chosen, batches, task.params, folder)
        return quantized, ["Min/max ranges only: other range methods do not support programs over 2 GB."]
    return pipeline.quantize(preparation.infer_shapes(model), batches, task, float_layers)


def _quantize_large(
    model: ModelProto, chosen: Sequence[OnnxLayer], batches: Sequence[Batch], params: Static, folder: Path
) -> ModelProto:
    """Quantize by ONNX Runtime's own file-based path, for programs above the size limit of protobuf."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    taken = {layer.node for layer in chosen if layer.op != "Gather"}
    excluded = [layer.node for layer in find_layers(model) if layer.node not in taken]
    prepared, written = folder / "to_quantize.onnx", folder / "quantized.onnx"
    save(model, prepared)
    with as_technique_error("ONNX Runtime could not quantize the program"), quiet_stdout():
        quantize_static(
            str(prepared),
            str(written),
            _reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=params.granularity == "per_channel",
            reduce_range=lacks_int8_dot_product(),
            activation_type=QuantType.QInt8 if params.symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=True,
            extra_options={"ActivationSymmetric": params.symmetric, "WeightSymmetric": True},
        )
    return load(written)


def _reader(batches: Sequence[Batch]) -> Any:
    """Create a calibration data reader; its base class comes from the optional import."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.range = iter(batches)

        def get_next(self) -> Batch | None:
            return next(self.range, None)

    return Reader()


def has_nncf() -> bool:
    return importlib.util.find_spec("nncf") is not None


def quantize_by_nncf(
    model: ModelProto, chosen: Sequence[OnnxLayer], batches: Sequence[Batch], params: Static, folder: Path
) -> tuple[ModelProto, list[str]]:
    """Quantize the chosen layers and what lies between them; return a sentence on each setting that was chosen.

    NNCF writes progress bars and its log to stdout, past `contextlib.redirect_stdout`; descriptor 1 is redirected to 2,
    so that a protocol or a JSON object on stdout stays whole.

    Raises:
        SetupError: nncf is not installed.
    """
    if not has_nncf():
        raise SetupError("algorithm nncf needs package nncf", "it is not installed", 'pip install "omgoptim[openvino]"')
    _keep_dims_of_means(model)
    taken = {layer.node for layer in chosen}
    ignored = [layer.node for layer in find_layers(model) if layer.node not in taken]
    with as_technique_error("NNCF could not quantize the program", "algorithm onnxruntime"), quiet_stdout():
        nncf = _import_without_telemetry()
        advanced, notes = _advanced_parameters(nncf, model, params)
        if is_large(model):
            advanced.backend_params = {"external_data_dir": str(folder)}
            save(model, folder / "to_quantize.onnx")
            model = onnx.load(str(folder / "to_quantize.onnx"), load_external_data=False)
        preset = nncf.QuantizationPreset.PERFORMANCE if params.symmetric else nncf.QuantizationPreset.MIXED

        def apply(fast: bool) -> ModelProto:
            copy = deepcopy(model)
            quantized: ModelProto = nncf.quantize(
                copy,
                nncf.Dataset(batches, dict),
                preset=preset,
                subset_size=len(batches),
                model_type=nncf.ModelType.TRANSFORMER if has_attention(model) else None,
                ignored_scope=nncf.IgnoredScope(names=ignored),
                fast_bias_correction=fast,
                advanced_parameters=advanced,
            )
            return quantized

        full_correction = params.rounding == "adaround" and bool(params.bias_correction)
        quantized = _with_full_bias_correction(apply, notes) if full_correction else apply(True)
    if params.rounding == "adaround":
        notes.append("Algorithm nncf does not support AdaRound: it was left out.")
    return quantized, notes


def _advanced_parameters(nncf: Any, model: ModelProto, params: Static) -> tuple[Any, list[str]]:
    """Translate params to NNCF's advanced parameters; a note where it has no equivalent."""
    from nncf.quantization.advanced_parameters import QuantizationParameters

    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE if lacks_int8_dot_product() else nncf.OverflowFix.DISABLE,
        weights_quantization_params=QuantizationParameters(per_channel=params.granularity == "per_channel"),
        disable_channel_alignment=not params.equalize or has_attention(model),
        disable_bias_correction=not params.bias_correction,
    )
    notes = _set_ranges(advanced, params)
    if params.smooth_quant is not None:
        advanced.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(matmul=params.smooth_quant or -1)
    return advanced, notes


def _with_full_bias_correction(apply: Callable[[bool], ModelProto], notes: list[str]) -> ModelProto:
    """Try layer-by-layer bias correction, then the fast one: the former fails on some graphs (Conv1d, NNCF 3.4)."""
    try:
        quantized = apply(False)
    except Exception as error:  # noqa: BLE001  whatever a foreign library raises; there is a way on without it
        notes.append(f"NNCF used fast bias correction: its layer-by-layer correction raised {type(error).__name__}.")
        return apply(True)
    notes.append("NNCF used layer-by-layer bias correction.")
    return quantized


def _set_ranges(advanced: Any, params: Static) -> list[str]:
    """Set NNCF's range estimator that is nearest to the requested method, in place; return a note where it has none."""
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Estimators

    if params.range_method == "auto":
        return []
    known = {
        "minmax": Estimators.MINMAX,
        "moving_average": Estimators.MEAN_MINMAX,
        "percentile": Estimators.MEAN_QUANTILE,
        "mse": Estimators.HISTOGRAM,
    }
    if params.range_method not in known:
        return [f"Algorithm nncf does not support range method {params.range_method}: its default was used."]
    advanced.activations_range_estimator_params = known[params.range_method]
    return []


def _keep_dims_of_means(model: ModelProto) -> None:
    """Replace a mean that drops its axes by one that keeps them and a Squeeze, in place.

    SmoothQuant may multiply the mean by a vector, and OpenVINO's CPU plugin (2026.4) fuses that product into the mean
    with the wrong axis, which ruins an encoder with mean pooling; with the Squeeze it does not.
    """
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        keepdims = next((a for a in node.attribute if a.name == "keepdims"), None)
        if node.op_type != "ReduceMean" or keepdims is None or keepdims.i != 0:
            continue
        axes = attribute(node, "axes", None)
        name = f"{node.output[0]}_axes" if axes else (node.input[1] if len(node.input) > 1 else "")
        if not name:  # over all axes: a scalar
            continue
        if axes:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), name))
        squeeze = onnx.helper.make_node(
            "Squeeze", [f"{node.output[0]}_kept", name], [node.output[0]], f"{node.name}_sq"
        )
        keepdims.i, node.output[0] = 1, f"{node.output[0]}_kept"
        nodes.append(squeeze)
    replace_nodes(model.graph, nodes)


def _import_without_telemetry() -> Any:
    """Disable NNCF's telemetry: it is off in an environment that looks like continuous integration."""
    names = {"NNCF_CI": "1", "CI": "true"}  # the first stubs NNCF's client, the second refuses the one underneath
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        import nncf
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return nncf
