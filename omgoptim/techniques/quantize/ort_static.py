"""Static quantization by ONNX Runtime's own quantizer: the file it writes is standard QDQ. Registers no technique."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from omgoptim.models.onnx_file import is_large, load, save
from omgoptim.models.onnx_graph import Layer, layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize.calibration import Batch
from omgoptim.techniques.quantize.onnx_file import as_technique_error, lacks_int8_dot_product, quiet_stdout

logger = logging.getLogger(__name__)


def prepare(model: ModelProto, folder: Path) -> ModelProto:
    """Infer shapes and fold, as the quantizer wants it; each step that fails is left out and logged.

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
            return load(prepared)
        except Exception as error:  # noqa: BLE001  shape inference raises bare Exception; there is a way on without it
            logger.info("preparing with skip_symbolic_shape=%s failed: %s", skip_symbolic_shape, error)
    return model


def quantize(
    model: ModelProto, chosen: Sequence[Layer], batches: Sequence[Batch], params: Static, folder: Path
) -> ModelProto:
    """Quantize the chosen layers of a prepared model and what lies between them.

    Activations are unsigned with a zero point, or signed without one if `params.symmetric`; weights are signed int8.
    Embeddings are left to `embeddings.py`. A histogram (entropy, percentile) is merged batch by batch: all of the
    activations of the calibration set at once would not fit memory.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    taken = {layer.node for layer in chosen if layer.op != "Gather"}
    excluded = [layer.node for layer in layers(model) if layer.node not in taken]
    prepared, written = folder / "to_quantize.onnx", folder / "quantized.onnx"
    save(model, prepared)
    options: dict[str, bool | int] = {"ActivationSymmetric": params.symmetric, "WeightSymmetric": True}
    if params.range_method != "minmax":
        options["CalibStridedMinMax"] = 1
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
            calibrate_method=methods[params.range_method],
            use_external_data_format=is_large(model),
            extra_options=options,
        )
    return load(written)


def _reader(batches: Sequence[Batch]) -> Any:
    """The quantizer's reader, a class of its own since its base comes from the optional import."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.range = iter(batches)

        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.range = iter(batches[start_index:end_index])

        def get_next(self) -> Batch | None:
            return next(self.range, None)

    return Reader()
