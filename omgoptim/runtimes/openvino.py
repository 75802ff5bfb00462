"""OpenVINO: runs the program file on Intel and AMD CPUs. Imports no torch, so that peak memory is the model's own.

The inference precision is always set: left alone, OpenVINO picks bfloat16 by itself where the CPU has it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.runtimes.engine import Engine, NumpyBatch, Session, Settings, as_float32, wall_clock
from omgoptim.runtimes.signature import Signature


def missing(device: str) -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install openvino"
    return None if device == "cpu" else "omgoptim runs OpenVINO on the CPU only"


def open_session(program: Path, signature: Signature, settings: Settings) -> Session:
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": settings.threads,
        "INFERENCE_PRECISION_HINT": "bf16" if settings.precision == "bfloat16" else "f32",
    }
    compiled = core.compile_model(core.read_model(str(program)), "CPU", options)
    request = compiled.create_infer_request()
    outputs = list(compiled.outputs)
    names = signature.input_names

    def prepare(batch: NumpyBatch) -> dict[str, NDArray[Any]]:
        return {name: np.ascontiguousarray(batch[name]) for name in names}

    def call(feed: dict[str, NDArray[Any]]) -> Any:
        return request.infer(feed, share_inputs=True, share_outputs=True)

    def to_numpy(result: Any) -> list[NDArray[Any]]:
        return [as_float32(np.array(result[output])) for output in outputs]

    return Session(prepare, call, to_numpy, wall_clock(call))


ENGINE = Engine("openvino", "program", missing, open_session)
