"""OpenVINO engine for program files on CPUs. Imports no torch, so that peak memory is the model's own.

The inference precision is always set: by default OpenVINO selects bfloat16 on CPUs that support it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.runtimes.engine import (
    Engine,
    NodeTime,
    NumpyBatch,
    Session,
    SessionSettings,
    as_float32,
    medians,
    profiled_calls,
    wall_clock,
)
from omgoptim.runtimes.external_data import external_data
from omgoptim.runtimes.signature import Signature

COMPUTE_DTYPES = {
    **dict.fromkeys(("i8", "u8"), "int8"),
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
}
"""Names of compute dtypes in OpenVINO."""

UNREPORTED = "FullyConnectedCompressed"
"""A product with integer weights and float inputs. OpenVINO rounds the inputs to int8 where the weights' groups allow
it, and does not report where."""


def missing(device: str) -> str | None:
    """Return why OpenVINO cannot be used on a device, with what to install; None if it can."""
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install openvino"
    return None if device == "cpu" else "omgoptim runs OpenVINO on the CPU only"


def open_session(program: Path, signature: Signature, settings: SessionSettings) -> Session:
    """Open an ONNX file in OpenVINO."""
    import openvino

    external_data(program)
    core = openvino.Core()
    options: dict[str, Any] = {
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

    def node_times(feed: dict[str, NDArray[Any]], seconds: float) -> list[NodeTime]:
        profiling = core.compile_model(core.read_model(str(program)), "CPU", options | {"PERF_COUNT": True})
        return _node_times(profiling, feed, seconds)

    return Session(prepare, call, to_numpy, wall_clock(call), node_times=node_times)


def _node_times(compiled: Any, feed: dict[str, NDArray[Any]], seconds: float) -> list[NodeTime]:
    """Read OpenVINO's performance counters, and the fused nodes from its execution graph."""
    covers: dict[str, tuple[str, ...]] = {}
    numbers: dict[str, str | None] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        names = str(info["originalLayersNames"].astype(str))
        covers[node.get_friendly_name()] = tuple(name for name in names.split(",") if name)
        numbers[node.get_friendly_name()] = computed_in(
            *(str(info[key].astype(str)) if key in info else "" for key in ("primitiveType", "runtimePrecision"))
        )
    request = compiled.create_infer_request()
    kinds: dict[str, str] = {}
    calls: list[dict[str, float]] = []
    for counts in profiled_calls(seconds):
        request.infer(feed, share_inputs=True, share_outputs=True)
        spent: dict[str, float] = {}
        for node in request.profiling_info if counts else ():
            if node.status == node.Status.EXECUTED:
                kinds[node.node_name] = node.node_type
                spent[node.node_name] = spent.get(node.node_name, 0.0) + node.real_time.total_seconds() * 1e3
        calls += [spent] if counts else []
    return [
        NodeTime(name, kinds[name], ms, covers.get(name, ()), None if kinds[name] == UNREPORTED else numbers.get(name))
        for name, ms in medians(calls).items()
    ]


def computed_in(primitive: str, precision: str) -> str | None:
    """Return the compute dtype of a node by the name of its kernel (`brgconv_avx512_amx_I8`), else by its precision.

    A node's precision is that of its input: a convolution can read int8 and still be the float kernel
    `brgconv_avx512_f32`. So the kernel's name comes first.
    """
    return COMPUTE_DTYPES.get(primitive.rpartition("_")[2].lower()) or COMPUTE_DTYPES.get(precision.lower())


ENGINE = Engine("openvino", "program", missing, open_session)
