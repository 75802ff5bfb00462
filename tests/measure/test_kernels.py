"""Compute dtype of each layer of a program, and shares of the time by kind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.measure.engine_profile import compute_dtypes, speedup_bound, time_shares
from omgoptim.models.artifact import save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.engine import Kernel
from omgoptim.runtimes.onnxruntime import node_times_of
from omgoptim.runtimes.openvino import computed_in
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature
from omgoptim.runtimes.torch_precision import convert, kernels_of

IMAGE = (1, 4, 6, 6)
SIGNATURE = Signature((InputTensor("x", "float32", (BATCH, *IMAGE[1:]), False),), "tensor")
SAMPLE = {"x": np.linspace(-1, 1, int(np.prod(IMAGE)), dtype=np.float32).reshape(IMAGE)}

SCALES = {"s": np.float32(0.02), "z": np.uint8(128), "sw": np.float32(0.01), "zw": np.int8(0)}
WEIGHT = (np.arange(4 * 4 * 9) % 200 - 100).astype(np.int8).reshape(4, 4, 3, 3)

Ask = Callable[[str, onnx.ModelProto, Sequence[str]], dict[str, str]]


def program(nodes: list[NodeProto]) -> onnx.ModelProto:
    """A graph from x to y, both images."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *IMAGE[1:]]) for name in ("x", "y")]
    stored = {**SCALES, "w": WEIGHT, "f": WEIGHT.astype(np.float32) / 100}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def pair(name: str) -> list[NodeProto]:
    """Quantize and dequantize a tensor: `a` becomes `a_dq`."""
    return [
        helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_dq"]),
    ]


def conv(name: str, source: str, weight: str, target: str) -> NodeProto:
    return helper.make_node("Conv", [source, weight, ""], [target], name, pads=[1, 1, 1, 1])


WHOLE = [
    helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["w_dq"]),
    *pair("x"),
    conv("first", "x_dq", "w_dq", "a"),
    *pair("a"),
    conv("second", "a_dq", "f", "b"),
    helper.make_node("Identity", ["b"], ["y"]),
]
"""The first convolution is surrounded by integers, the second has a float weight."""


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """`ask(runtime, model, layers)`: what the engine says of these layers."""

    def ask(runtime: str, model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, str]:
        pytest.importorskip(runtime)
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        session = ENGINES[runtime].open(path, SIGNATURE, SessionSettings(1))
        assert session.node_times is not None
        times = session.node_times(session.prepare(SAMPLE), 0.0)
        return compute_dtypes([Kernel(t.name, t.kind, t.computed_in, t.covers) for t in times], model, layers)

    return ask


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_convolution_between_integers_is_int8_and_one_with_a_float_weight_is_not(ask: Ask, runtime: str) -> None:
    assert ask(runtime, program(WHOLE), ["first", "second"]) == {"first": "int8", "second": "float32"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_integer_weight_without_integer_inputs_is_computed_in_float(ask: Ask, runtime: str) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["w_dq"]),
        conv("only", "x", "w_dq", "y"),
    ]
    assert ask(runtime, program(nodes), ["only"]) == {"only": "float32"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_convolution_fused_with_its_activation_is_still_found(ask: Ask, runtime: str) -> None:
    nodes = [conv("only", "x", "f", "a"), helper.make_node("Relu", ["a"], ["y"], "act")]
    assert ask(runtime, program(nodes), ["only"]) == {"only": "float32"}


def test_a_layer_that_the_engine_took_apart_is_int8_only_where_all_of_it_is() -> None:
    model = program(WHOLE)
    kernels = [Kernel("first", "QLinearConv", "int8"), Kernel("first_quant", "Conv", "float32")]
    assert compute_dtypes(kernels, model, ["first"]) == {"first": "float32"}
    assert compute_dtypes(kernels[:1], model, ["first"]) == {"first": "int8"}


def test_a_kernel_that_only_moves_data_does_not_decide_a_layers_dtype() -> None:
    assert compute_dtypes([Kernel("first", "Reorder", "float32")], program(WHOLE), ["first"]) == {}


def test_a_product_of_activations_is_not_taken_for_the_layer_before_it() -> None:
    nodes = [
        conv("layer", "x", "f", "a"),
        helper.make_node("MatMul", ["a", "a"], ["y"], "scores"),
    ]
    assert compute_dtypes([Kernel("scores", "MatMul", "float32")], program(nodes), ["layer"]) == {}


@pytest.mark.parametrize(
    ("op", "level", "expected"),
    [("MatMul", {}, "int8"), ("MatMulNBits", {}, "float32"), ("MatMulNBits", {"accuracy_level": 4}, "int8")],
)
def test_a_packed_product_is_int8_where_onnx_runtime_fused_it_or_the_file_asks_for_it(
    op: str, level: dict[str, int], expected: str
) -> None:
    model = program([helper.make_node(op, ["x", "f"], ["y"], "n", **level)])
    assert compute_dtypes([Kernel("n", "MatMulNBits", "float32")], model, ["n"]) == {"n": expected}


@pytest.mark.parametrize("accuracy_level", ["0", "4"])
def test_onnx_runtime_rounds_the_inputs_of_a_packed_product_that_it_fuses_by_default(
    accuracy_level: str,
) -> None:
    """The assumption of `compute_dtypes`: fused without a setting is level 4, and level 0 gives something else."""
    import onnxruntime

    rng = np.random.default_rng(0)
    weight = helper.make_tensor("w", TensorProto.UINT4, [64, 32], rng.integers(0, 16, 64 * 32).tolist())
    scale = numpy_helper.from_array(rng.random((2, 32), np.float32), "s")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, w]) for n, w in (("x", 64), ("y", 32))]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "f"], ["y"], "n"),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feed = {"x": rng.normal(size=(1, 64)).astype(np.float32)}

    def run(**config: str) -> Any:
        options = onnxruntime.SessionOptions()
        for key, value in config.items():
            options.add_session_config_entry(f"session.{key}", value)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, feed)[0]

    same = bool(np.array_equal(run(), run(qdq_matmulnbits_accuracy_level=accuracy_level)))
    assert same == (accuracy_level == "4")


def test_recurrent_layers_that_the_engine_renamed_are_known_where_all_agree() -> None:
    nodes = [helper.make_node("LSTM", ["x", "f", "f"], [name], name) for name in ("one", "two")]
    agree = [Kernel("LSTMSequence_1", "LSTMSequence", "float32"), Kernel("LSTMSequence_2", "LSTMSequence", "float32")]
    assert compute_dtypes(agree, program(nodes), ["one", "two"]) == {"one": "float32", "two": "float32"}
    differ = [agree[0], Kernel("LSTMSequence_2", "LSTMSequence", "bfloat16")]
    assert compute_dtypes(differ, program(nodes), ["one", "two"]) == {}


@pytest.mark.parametrize(
    ("primitive", "precision", "expected"),
    [
        ("brgconv_avx512_amx_I8", "u8", "int8"),
        ("brgconv_avx512_f32", "i8", "float32"),  # reads int8, and is the float kernel
        ("undef_i8", "i8", "int8"),
        ("jit_gemm_BF16", "bf16", "bfloat16"),
        ("", "f32", "float32"),
        ("ref_any", "i64", None),
    ],
)
def test_the_name_of_openvinos_kernel_takes_precedence_over_its_input_type(
    primitive: str, precision: str, expected: str | None
) -> None:
    assert computed_in(primitive, precision) == expected


@pytest.mark.parametrize(
    ("kind", "types", "expected"),
    [
        ("QLinearConv", ["uint8", "float", "uint8"], "int8"),
        ("MatMulIntegerToFloat", ["uint8", "float"], "int8"),
        ("DynamicQuantizeMatMul", ["float", "float", "int8"], "int8"),
        ("DynamicQuantizeLSTM", ["float"], "int8"),
        ("QGemm", ["uint8"], "int8"),
        ("DynamicQuantizeLinear", ["float"], "float32"),
        ("MatMulNBits", ["float", "uint8"], "float32"),
        ("FusedConv", ["float16"], "float16"),
        ("Gather", ["int8", "int64"], None),
    ],
)
def test_the_operator_that_onnx_runtime_ran_decides_and_else_its_first_float_input(
    kind: str, types: list[str], expected: str | None
) -> None:
    args: dict[str, Any] = {"op_name": kind, "input_type_shape": [{name: [1]} for name in types]}
    event = {"cat": "Node", "name": "n_kernel_time", "ts": 0, "dur": 1, "args": args}
    run = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 1}
    (time,) = node_times_of([event, run] * 3)
    assert time.computed_in == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_torch_layer_is_int8_where_it_is_packed_and_else_computes_in_its_weights_type() -> None:
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.Linear(2, 2), torch.nn.ReLU())
    dtypes = {kernel.name: kernel.computed_in for kernel in kernels_of(convert(module, "int8_dynamic"))}
    assert dtypes == {"0": "float32", "1": "int8"}
    half = convert(torch.nn.Sequential(torch.nn.Linear(2, 2)), "bfloat16")
    assert kernels_of(half) == [Kernel("0", "Linear", "bfloat16")]


REPORTED = """
import omgoptim.measure.measuring_server as measuring_server
server = measuring_server.MeasuringServer()
import os
policy = {"project": os.path.dirname(sys.argv[2]), "allowed": [], "modules": [], "trusted": True}
server.open(sys.argv[2], 1, None, policy, {"latency": sys.argv[3]})
print({kernel["computed_in"] for kernel in server.kernels("latency")["kernels"] if "Conv" in kernel["kind"]})
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_measuring_process_reports_it_without_torch_and_without_onnx(tmp_path: Path) -> None:
    onnx.save(program(WHOLE), tmp_path / "model.onnx")
    outputs = ENGINES["onnxruntime"].open(tmp_path / "model.onnx", SIGNATURE, SessionSettings(1)).run(SAMPLE)
    manifest = Manifest("onnxruntime", "int8", SIGNATURE)
    save_program(tmp_path / "artifact", tmp_path / "model.onnx", manifest, OutputCheck(SAMPLE, outputs))
    np.savez(tmp_path / "one.npz", x=SAMPLE["x"])
    command = [sys.executable, "-c", IMPORT_OMGOPTIM + REPORTED, str(PACKAGE_FILE), "artifact", "one.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    numbers, modules = done.stdout.splitlines()
    assert "'int8'" in numbers
    assert "'float32'" in numbers
    assert not {"torch", "onnx"} & set(modules.split())


def test_times_of_a_kind_add_up_and_integers_stay_apart_from_floats() -> None:
    nodes = [("Conv", 1.0, "int8"), ("Conv", 2.0, "float32"), ("Add", 0.5, None), ("Conv", 0.5, "int8")]
    found = time_shares(nodes)
    assert [(time.kind, time.time_ms, time.quantized) for time in found] == [
        ("Conv", 2.0, False),
        ("Conv", 1.5, True),
        ("Add", 0.5, False),
    ]
    assert [time.share for time in found] == pytest.approx([0.5, 0.375, 0.125])


def test_the_bound_is_amdahls_and_none_where_it_does_not_apply() -> None:
    half = time_shares([("Conv", 3.0, "int8"), ("Add", 1.0, "float32")])
    assert speedup_bound(half) == pytest.approx(4.0)
    assert speedup_bound(time_shares([("Add", 1.0, "float32")])) is None
    assert speedup_bound(time_shares([("Conv", 1.0, "int8")])) is None
    assert time_shares([]) == []
    assert speedup_bound([]) is None
