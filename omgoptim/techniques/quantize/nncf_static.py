"""Static quantization by NNCF: bias correction, and SmoothQuant for transformers. Registers no technique."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from omgoptim.errors import SetupError
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize.calibration import Batch
from omgoptim.techniques.quantize.onnx_file import (
    as_technique_error,
    is_large,
    lacks_int8_dot_product,
    quiet_stdout,
    save,
)
from omgoptim.techniques.quantize.onnx_graph import Layer, has_attention, layers


def is_installed() -> bool:
    return importlib.util.find_spec("nncf") is not None


def quantize(
    model: ModelProto, chosen: Sequence[Layer], batches: Sequence[Batch], params: Static, folder: Path
) -> ModelProto:
    """Quantize the chosen layers and what lies between them.

    NNCF writes progress bars and its log to stdout, past `contextlib.redirect_stdout`; descriptor 1 is led to 2 so that
    a protocol or a JSON object on stdout stays whole.

    Raises:
        SetupError: nncf is not installed.
    """
    if not is_installed():
        raise SetupError("algorithm nncf needs nncf", "it is not installed", 'pip install "omgoptim[openvino]"')
    taken = {layer.node for layer in chosen}
    ignored = [layer.node for layer in layers(model) if layer.node not in taken]
    with as_technique_error("NNCF could not quantize the program", "algorithm onnxruntime"), quiet_stdout():
        nncf = _import_without_telemetry()
        from nncf.quantization.advanced_parameters import QuantizationParameters

        advanced = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE if lacks_int8_dot_product() else nncf.OverflowFix.DISABLE,
            weights_quantization_params=QuantizationParameters(per_channel=params.granularity == "per_channel"),
        )
        if is_large(model):
            advanced.backend_params = {"external_data_dir": str(folder)}
            save(model, folder / "to_quantize.onnx")
            model = onnx.load(str(folder / "to_quantize.onnx"), load_external_data=False)
        preset = nncf.QuantizationPreset.PERFORMANCE if params.symmetric else nncf.QuantizationPreset.MIXED
        return nncf.quantize(
            model,
            nncf.Dataset(batches, dict),
            preset=preset,
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if has_attention(model) else None,
            ignored_scope=nncf.IgnoredScope(names=ignored),
            advanced_parameters=advanced,
        )


def _import_without_telemetry() -> Any:
    """NNCF reports its use over the network unless its environment says that it runs in continuous integration."""
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
