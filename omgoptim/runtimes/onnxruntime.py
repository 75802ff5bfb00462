"""ONNX Runtime engine for program files. Imports no torch, so that peak memory is the model's own."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from omgoptim.errors import ArtifactError
from omgoptim.runtimes.engine import (
    WARM_UP,
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

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

TENSORRT_PROVIDER = "TensorrtExecutionProvider"

KERNEL = "_kernel_time"
"""Suffix of a node's event in the profile."""

INTEGER = re.compile(r"QLinear\w+|QGemm|QAttention|\w*Integer\w*|DynamicQuantize(MatMul|LSTM)")
"""Operators whose products are sums of integers."""

FLOATS = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "double": "float64"}
"""Names of floating types in the profile."""

KEEP_FLOAT_LAYERS = ("optimization.disable_specified_optimizers", "WeightBiasQuantization")
"""Session option for a program with layers in float between quantized ones. Since 1.21 ONNX Runtime rounds the weight
of such a layer to int8 per tensor when it opens the file (microsoft/onnxruntime pull requests 22969 and 25673)."""


def missing(device: str) -> str | None:
    """Return why ONNX Runtime cannot be used on a device, with what to install; None if it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime"
    import onnxruntime

    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {PROVIDERS[device]}: pip install onnxruntime-gpu"
    return None


def missing_tensorrt(device: str) -> str | None:
    """Return why ONNX Runtime's TensorRT provider cannot be used, or None."""
    if device != "cuda":
        return "TensorRT needs device cuda"
    reason = missing(device)
    if reason is not None:
        return reason
    import onnxruntime

    if TENSORRT_PROVIDER not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {TENSORRT_PROVIDER}: pip install onnxruntime-gpu tensorrt"
    return None


def open_session(program: Path, signature: Signature, settings: SessionSettings) -> Session:
    """Open an ONNX file in ONNX Runtime."""
    session = _session(program, settings)
    if settings.device != "cpu":
        return bound_session(session, settings.device)
    names = [tensor.name for tensor in session.get_inputs()]
    outputs = [tensor.name for tensor in session.get_outputs()]
    del signature  # the program carries its own

    def call(feed: dict[str, NDArray[Any]]) -> Any:
        return session.run(outputs, feed)

    def prepare(batch: NumpyBatch) -> dict[str, NDArray[Any]]:
        return {name: batch[name] for name in names}

    def node_times(feed: dict[str, NDArray[Any]], seconds: float) -> list[NodeTime]:
        return _node_times(program, settings, feed, seconds)

    return Session(
        prepare=prepare,
        call=call,
        to_numpy=lambda result: [as_float32(array) for array in result],
        seconds=wall_clock(call),
        node_times=node_times,
    )


def open_tensorrt(program: Path, signature: Signature, settings: SessionSettings) -> Session:
    """Open an ONNX file in TensorRT, which builds its engine now; what it cannot take runs in the CUDA provider."""
    del signature
    half = {"trt_fp16_enable": "1"} if settings.precision == "float16" else {}
    providers = [(TENSORRT_PROVIDER, half), PROVIDERS["cuda"]]
    return bound_session(_session(program, settings, providers=providers), "cuda")


def bound_session(session: Any, device: str) -> Session:
    """Return a session whose inputs and outputs stay on the device, so that a call's time has no transfer in it.

    ONNX Runtime waits for the device at the end of a call. It does not report a node's time or its memory there.
    """
    import onnxruntime

    names = [tensor.name for tensor in session.get_inputs()]
    outputs = [tensor.name for tensor in session.get_outputs()]

    def prepare(batch: NumpyBatch) -> Any:
        binding = session.io_binding()
        for name in names:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(batch[name], device, 0))
        for name in outputs:
            binding.bind_output(name, device)
        return binding

    def call(binding: Any) -> Any:
        session.run_with_iobinding(binding)
        return binding

    def to_numpy(binding: Any) -> list[NDArray[Any]]:
        return [as_float32(array) for array in binding.copy_outputs_to_cpu()]

    return Session(prepare, call, to_numpy, wall_clock(call))


def _session(
    program: Path, settings: SessionSettings, profile: Path | None = None, providers: list[Any] | None = None
) -> Any:
    """Open the program; `profile` is the path prefix of the profile file.

    Raises:
        ArtifactError: ONNX Runtime fell back to another provider, as it does where a library of the wanted one is
            missing.
    """
    import onnxruntime

    external_data(program)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if settings.mixed_precision:
        options.add_session_config_entry(*KEEP_FLOAT_LAYERS)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    requested = providers or [PROVIDERS[settings.device]]
    session = onnxruntime.InferenceSession(str(program), options, providers=requested)
    first = requested[0] if isinstance(requested[0], str) else requested[0][0]
    if first not in session.get_providers():
        raise ArtifactError(
            f"ONNX Runtime could not use its {first}",
            f"it fell back to {', '.join(session.get_providers())}: a library of the provider could not be loaded",
            "install the CUDA, cuDNN and TensorRT versions that this onnxruntime-gpu requires",
        )
    return session


def _node_times(
    program: Path, settings: SessionSettings, feed: dict[str, NDArray[Any]], seconds: float
) -> list[NodeTime]:
    """Read ONNX Runtime's profile, which it writes when the session ends."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(program, settings, Path(folder) / "profile")
        for _ in profiled_calls(seconds):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return node_times_of(events)


def node_times_of(events: list[dict[str, Any]]) -> list[NodeTime]:
    """Compute the time of each node from the events of a profile, without the first calls.

    The event of a call follows those of its nodes. The nodes of a loop's body lie within the loop's own event.
    """
    calls: list[dict[str, float]] = []
    kinds: dict[str, str] = {}
    numbers: dict[str, str | None] = {}
    nodes: list[dict[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            name = event["name"].removesuffix(KERNEL)
            kinds[name] = event["args"].get("op_name", "")
            numbers[name] = _computed_in(kinds[name], event["args"].get("input_type_shape", []))
            nodes.append(event)
        elif event.get("name") == "model_run":
            calls.append(_self_ms(nodes))
            nodes = []
    return [NodeTime(name, kinds[name], ms, computed_in=numbers[name]) for name, ms in medians(calls[WARM_UP:]).items()]


def _computed_in(kind: str, inputs: list[dict[str, Any]]) -> str | None:
    """Return the dtype by operator, else by the first floating tensor that it read: `[{"float": [1, 8]}, …]`.

    The operator decides, because an integer product also reads its scales, which are floating.
    """
    if INTEGER.fullmatch(kind):
        return "int8"
    return next((FLOATS[name] for types in inputs for name in types if name in FLOATS), None)


def _self_ms(nodes: list[dict[str, Any]]) -> dict[str, float]:
    """Map node name to ms within one call, less the time of nodes inside it; several uses add up."""
    spent: dict[str, float] = {}
    enclosing: list[tuple[str, float]] = []
    for event in sorted(nodes, key=lambda node: (node["ts"], -node["dur"])):
        name, start, ms = event["name"].removesuffix(KERNEL), event["ts"], event["dur"] / 1e3
        while enclosing and enclosing[-1][1] <= start:
            enclosing.pop()
        if enclosing:
            spent[enclosing[-1][0]] -= ms
        spent[name] = spent.get(name, 0.0) + ms
        enclosing.append((name, start + event["dur"]))
    return spent


ENGINE = Engine("onnxruntime", "program", missing, open_session)
TENSORRT = Engine("tensorrt", "program", missing_tensorrt, open_tensorrt)
