"""Static int8 quantization by the peers' own APIs and by ours, from the same float program and calibration batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._ptq.state import apply_preset
from omgoptim.techniques.registry import ProgramRun, apply_to_program

Batches = Sequence[dict[str, NDArray[Any]]]
Quantizer = Callable[[Path, Path, Batches], None]
"""`quantize(source, target, batches)`: writes the int8 program of a float one."""


def onnxruntime_default(source: Path, target: Path, batches: Batches) -> None:
    _onnxruntime(source, target, batches)


def onnxruntime_per_channel(source: Path, target: Path, batches: Batches) -> None:
    from onnxruntime.quantization import QuantType

    _onnxruntime(
        source, target, batches, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )


def _onnxruntime(source: Path, target: Path, batches: Batches, **options: Any) -> None:
    """ONNX Runtime's own preparation and quantizer."""
    from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.batches, None)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(str(prepared), str(target), Reader(), **options)


def nncf_default(source: Path, target: Path, batches: Batches) -> None:
    import nncf
    import onnx

    quantized = nncf.quantize(onnx.load(str(source)), nncf.Dataset(batches, dict), subset_size=len(batches))
    onnx.save(quantized, str(target))


def nncf_aligned(source: Path, target: Path, batches: Batches) -> None:
    """NNCF with what it has and leaves off by default: channel alignment; and its slower bias correction."""
    import nncf
    import onnx

    quantized = nncf.quantize(
        onnx.load(str(source)),
        nncf.Dataset(batches, dict),
        subset_size=len(batches),
        fast_bias_correction=False,
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_channel_alignment=False),
    )
    onnx.save(quantized, str(target))


def ours(effort: str, algorithm: str = "onnxruntime") -> Quantizer:
    """Our static quantization at an effort: fast, balanced or best."""

    def write(source: Path, target: Path, batches: Batches) -> None:
        params = apply_preset(Static(algorithm=algorithm), effort)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as scratch:
            outcome = apply_to_program(source, target, params, ProgramRun(list(batches), Path(scratch)))
        print(f"{algorithm} {effort}: {'; '.join(outcome.notes)}", flush=True)

    return write


PEERS: dict[str, Quantizer] = {
    "onnxruntime default": onnxruntime_default,
    "onnxruntime per channel": onnxruntime_per_channel,
    "nncf default": nncf_default,
}
"""The peers whose best is compared with, by their own API on the same data."""

OTHERS: dict[str, Quantizer] = {"nncf aligned, full bias correction": nncf_aligned}
"""For information: what a peer can do when it is told to."""

OURS: dict[str, Quantizer] = {
    "omgoptim fast": ours("fast"),
    "omgoptim balanced": ours("balanced"),
    "omgoptim best": ours("best"),
    "omgoptim balanced, nncf": ours("balanced", "nncf"),
}


def outputs(path: Path, images: NDArray[Any]) -> NDArray[Any]:
    """Scores (N, classes) of a file with one input, run by ONNX Runtime with its own optimizations."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[i : i + 100]})[0] for i in range(0, len(images), 100)]
    return np.concatenate(parts)


def sqnr_db(want: NDArray[Any], got: NDArray[Any]) -> float:
    """Signal to quantization noise of outputs, in dB."""
    return float(10 * np.log10(np.square(want).sum() / np.square(want - got).sum()))
