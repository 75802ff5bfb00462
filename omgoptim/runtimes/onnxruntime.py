"""ONNX Runtime: runs the program file. Imports no torch, so that peak memory is the model's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from omgoptim.runtimes.engine import Engine, NumpyBatch, Session, Settings, as_float32, wall_clock
from omgoptim.runtimes.signature import Signature

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def missing(device: str) -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime"
    import onnxruntime

    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {PROVIDERS[device]}: pip install onnxruntime-gpu"
    return None


def open_session(program: Path, signature: Signature, settings: Settings) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(program), options, providers=[PROVIDERS[settings.device]])
    names = [tensor.name for tensor in session.get_inputs()]
    outputs = [tensor.name for tensor in session.get_outputs()]
    del signature  # the program carries its own

    def call(feed: dict[str, NDArray[Any]]) -> Any:
        return session.run(outputs, feed)

    def prepare(batch: NumpyBatch) -> dict[str, NDArray[Any]]:
        return {name: batch[name] for name in names}

    return Session(prepare, call, lambda result: [as_float32(array) for array in result], wall_clock(call))


ENGINE = Engine("onnxruntime", "program", missing, open_session)
