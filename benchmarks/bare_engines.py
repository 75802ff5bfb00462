"""What one would write by hand: load, export, quantize with each engine's own API. No omgoptim, and no measuring.

    python benchmarks/bare_engines.py PROJECT FILE.py OUTPUT STEP...

Every step leaves a folder under OUTPUT with model.onnx, or model.xml and model.bin.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

CALIBRATION_SAMPLES = 148
"""As many as omgoptim calibrates with on these examples: half of their calibration split; the other half selects."""

Batch = dict[str, Any]


def calibration(module: nn.Module, data: Any) -> list[Batch]:
    """Numpy batches by input name."""
    names = list(inspect.signature(module.forward).parameters)
    loader = DataLoader(data, 32) if isinstance(data, Dataset) else data
    batches, left = [], CALIBRATION_SAMPLES
    for item in loader:
        named = item if isinstance(item, dict) else dict(zip(names, item[:-1], strict=False))
        batches.append({name: tensor[:left].numpy() for name, tensor in named.items()})
        left -= min(left, len(next(iter(named.values()))))
        if not left:
            break
    return batches


def export(module: nn.Module, batch: Batch, path: Path) -> None:
    example = {name: torch.from_numpy(array[:2]).clone() for name, array in batch.items()}
    dim = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        module,
        kwargs=example,
        dynamo=True,
        dynamic_shapes={name: {0: dim} for name in example},
        input_names=list(example),
        output_names=["output"],
        verbose=False,
    )
    if program is None:
        raise RuntimeError("no program")
    program.save(str(path), external_data=False)


def preprocessed(source: Path, target: Path) -> Path:
    from onnxruntime.quantization import quant_pre_process

    prepared = target.with_name("prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception:  # noqa: BLE001  its symbolic shape inference does not know every model
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def ort_static(source: Path, target: Path, batches: list[Batch]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Batch | None:
            return next(self.left, None)

    quantize_static(
        str(preprocessed(source, target)),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def ort_dynamic(source: Path, target: Path, _: list[Batch]) -> None:
    """On a preprocessed model, as ONNX Runtime's documentation advises; it also lets an LSTM's weights be seen."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(preprocessed(source, target)), str(target), per_channel=True, weight_type=QuantType.QInt8)


def nncf_onnx(source: Path, target: Path, batches: list[Batch]) -> None:
    import onnx

    onnx.save(_nncf(onnx.load(str(source)), batches, source), str(target))


def nncf_openvino(source: Path, target: Path, batches: list[Batch]) -> None:
    import openvino

    quantized = _nncf(openvino.Core().read_model(str(source)), batches, source)
    openvino.save_model(quantized, target.with_suffix(".xml"), compress_to_fp16=False)


def _nncf(model: Any, batches: list[Batch], source: Path) -> Any:
    import nncf
    import onnx

    attention = any(node.op_type == "Softmax" for node in onnx.load(str(source), load_external_data=False).graph.node)
    kind = nncf.ModelType.TRANSFORMER if attention else None
    return nncf.quantize(model, nncf.Dataset(batches, dict), model_type=kind, subset_size=len(batches))


STEPS: dict[str, Callable[[Path, Path, list[Batch]], None]] = {
    "ort_static": ort_static,
    "ort_dynamic": ort_dynamic,
    "nncf_onnx": nncf_onnx,
    "nncf_openvino": nncf_openvino,
}


def main() -> None:
    project, file, output, *steps = sys.argv[1:]
    sys.path.insert(0, str(Path(project, file).parent))
    example = importlib.import_module(Path(file).stem)
    module = example.build()
    batches = calibration(module, example.load("calibration"))
    source = Path(output) / "float" / "model.onnx"
    source.parent.mkdir(parents=True)
    export(module, batches[0], source)
    for step in steps:
        target = Path(output) / step / "model.onnx"
        target.parent.mkdir()
        if step == "torch_bf16":
            torch.save(copy.deepcopy(module).to(torch.bfloat16).state_dict(), target.with_suffix(".pt"))
        else:
            STEPS[step](source, target, batches)


if __name__ == "__main__":
    main()
