"""Static quantization by ONNX Runtime's QDQ writer, with the ranges and weights of the PTQ pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from omgoptim.models.onnx_file import is_large, load, save
from omgoptim.models.onnx_graph import OnnxLayer, find_layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx import preparation
from omgoptim.techniques.quantize._onnx.runtime import as_technique_error, lacks_int8_dot_product, quiet_stdout
from omgoptim.techniques.quantize._ptq import pipeline
from omgoptim.techniques.quantize._ptq.calibration import Batch
from omgoptim.techniques.quantize._ptq.state import PtqTask


def quantize(
    model: ModelProto, batches: Sequence[Batch], task: PtqTask, folder: Path, kept: list[OnnxLayer] | None = None
) -> tuple[ModelProto, list[str]]:
    """Quantize the chosen layers of a prepared model and what lies between them.

    Activations are unsigned with a zero point, or signed without one if `params.symmetric`; weights are signed int8.
    Embeddings are left to `_onnx/weight_storage.py`. A program past what protobuf holds in memory gets plain ranges.

    Args:
        model: the prepared float program.
        batches: calibration inputs by name.
        task: layers, number format and threads.
        folder: an existing folder for the writer's files.
        kept: takes the chosen layers that stay in float.

    Returns:
        The QDQ program, and what was done, a sentence each.
    """
    if is_large(model):
        quantized = _large(model, task.chosen, batches, task.params, folder)
        return quantized, ["Programs over 2 GB get min/max ranges only."]
    return pipeline.quantize(preparation.infer_shapes(model), batches, task, kept)


def _large(
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
