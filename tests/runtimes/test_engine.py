from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from omgoptim.errors import RequestError
from omgoptim.runtimes import ENGINES, engine_named
from omgoptim.runtimes.engine import as_float32, engine_message, wall_clock


def test_every_engine_is_found_by_its_name_and_an_unknown_one_is_answered_with_the_nearest() -> None:
    assert all(engine_named(name).name == name for name in ENGINES)
    with pytest.raises(RequestError, match="'onnx_runtime' is not a runtime") as error:
        engine_named("onnx_runtime")
    assert error.value.why.startswith("Did you mean 'onnxruntime'?")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch_eager"])
def test_a_missing_package_is_reported_with_its_install_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_named(name).missing("cpu") is None
    package = name.removesuffix("_eager")
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    assert engine_named(name).missing("cpu") == f"{package} is not installed: pip install {package}"


def test_a_device_that_an_engine_cannot_use_is_reported() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert "no CUDA device" in str(engine_named("torch_eager").missing("cuda"))
    assert "CUDAExecutionProvider" in str(engine_named("onnxruntime").missing("cuda"))
    assert engine_named("openvino").missing("cuda") == "omgoptim runs OpenVINO on the CPU only"


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install g++ or clang" in str(engine_named("torch_compile").missing("cpu"))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    assert engine_named("torch_compile").missing("cpu") is None


def test_the_clock_makes_exactly_the_calls_it_divides_by() -> None:
    calls: list[int] = []
    assert wall_clock(calls.append)(7, 5) > 0
    assert calls == [7] * 5


def test_floats_are_returned_as_float32_and_others_unchanged() -> None:
    for dtype in (np.float16, np.float64):
        assert as_float32(np.ones(2, dtype)).dtype == np.float32
    for array in (np.ones(2, np.float32), np.ones(2, np.int64), np.ones(2, bool)):
        assert as_float32(array) is array


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /a/b.onnx failed:/onnxruntime_src/onnxruntime/core/graph/"
            "model.cc:180 onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::PathString&) Unsupported "
            "model IR version: 99, max supported IR version: 13\n",
            "Load model from /a/b.onnx failed:Unsupported model IR version: 99, max supported IR version: 13",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: x for the following indices"
            "\n index: 0 Got: 3 Expected: 2\n Please fix either the inputs/outputs or the model.",
            "Got invalid dimensions for input: x for the following indices index: 0 Got: 3 Expected: 2",
        ),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Reshape node. "
            "Status Message: /onnxruntime_src/onnxruntime/core/providers/cpu/tensor/reshape_helper.h:45 onnxruntime::"
            "ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, bool) The input cannot be reshaped",
            "Non-zero status code returned while running Reshape node. Status Message: The input cannot be reshaped",
        ),
        (
            "Exception from src/inference/src/cpp/core.cpp:97:\nException from src/core/node.cpp:12:\n"
            "Check 'a == b' failed at src/core/shape.cpp:44:\nShapes do not match\n\n",
            "Shapes do not match",
        ),
        ("", "RuntimeError"),
    ],
)
def test_an_engines_error_is_its_last_meaningful_line(message: str, said: str) -> None:
    assert engine_message(RuntimeError(message)) == said


def test_what_onnx_runtime_really_raises_has_no_place_of_its_source_in_it() -> None:
    import onnxruntime

    with pytest.raises(Exception) as error:  # noqa: PT011  onnxruntime's errors have no common base
        onnxruntime.InferenceSession(b"no model")
    said = engine_message(error.value)
    assert said
    assert ".cc:" not in said
    assert "[ONNXRuntimeError]" not in said


def test_a_session_bound_to_a_device_gives_what_the_plain_one_gives(tmp_path: Path) -> None:
    import onnxruntime

    from omgoptim.runtimes.onnxruntime import bound_session

    program = tmp_path / "model.onnx"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), program)
    session = bound_session(onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"]), "cpu")
    for rows in (2, 5):
        batch = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3) - 4
        assert np.array_equal(session.run({"x": batch})[0], np.maximum(batch, 0))
    assert session.seconds(session.prepare({"x": batch}), 3) > 0


def test_tensorrt_is_for_gpus_and_says_what_to_install() -> None:
    assert engine_named("tensorrt").missing("cpu") == "TensorRT needs device cuda"
    if "TensorrtExecutionProvider" not in __import__("onnxruntime").get_available_providers():
        assert "pip install onnxruntime-gpu" in str(engine_named("tensorrt").missing("cuda"))
