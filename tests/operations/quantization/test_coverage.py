"""Quantization coverage of programs written by hand, run by two engines, and of a torch module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.models.artifact import save_module, save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.operations.quantization.coverage import (
    FloatModel,
    activation_range_warnings,
    coverage_warnings,
    measure_coverage,
    read_kernels,
)
from omgoptim.reports import Coverage, Skip
from omgoptim.requests.quantize import Dynamic
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.engine import Kernel
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature
from omgoptim.runtimes.torch_precision import convert, kernels_of
from omgoptim.techniques.registry import ProgramRun, apply_to_program

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SIGNATURE = Signature((InputTensor("x", "float32", (BATCH, 64), False),), "tensor")
SAMPLE = {"x": np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)}
WIDE = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
NARROW = WIDE[:, :4].copy()
LEFT = "left in float by targets or ignore"

Proof = Callable[..., Coverage | None]


def save(path: Path, nodes: Sequence[NodeProto], **stored: np.ndarray) -> Path:
    """A program from x (batch, 64) to y (batch, 4)."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("x", 64), ("y", 4))]
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def products(first: str = "x", wide: str = "wide.weight", narrow: str = "narrow.weight") -> list[NodeProto]:
    return [
        helper.make_node("MatMul", [first, wide], ["a"], "n1"),
        helper.make_node("Relu", ["a"], ["b"], "n2"),
        helper.make_node("MatMul", ["b", narrow], ["y"], "n3"),
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two float layers, `wide` with sixteen times the weights of `narrow`."""
    return save(tmp_path / "float.onnx", products(), **{"wide.weight": WIDE, "narrow.weight": NARROW})


@pytest.fixture
def proof(source: Path, tmp_path: Path) -> Proof:
    """`proof(runtime, program, scheme, skipped)`: saved as an artifact, opened by its engine, and proved."""

    def proof(runtime: str, program: Path, scheme: str, skipped: Sequence[Skip] = ()) -> Coverage | None:
        pytest.importorskip(runtime)
        session = ENGINES[runtime].open(program, SIGNATURE, SessionSettings(1, precision="int8"))
        folder = tmp_path / f"artifact-{runtime}"
        save_program(folder, program, Manifest(runtime, "int8", SIGNATURE), OutputCheck(SAMPLE, session.run(SAMPLE)))
        assert session.node_times is not None
        times = session.node_times(session.prepare(SAMPLE), 0.0)
        kernels = [Kernel(time.name, time.kind, time.computed_in, time.covers) for time in times]
        return measure_coverage(FloatModel(source, None), folder, scheme, list(skipped), kernels)

    return proof


def quantized(weight: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(weight / 0.03), -127, 127).astype(np.int8)


def static(path: Path, activations: bool) -> Path:
    """`wide` in int8, per tensor; what it reads and gives in integers, or not. `narrow` stays."""
    first, relu, last = products("x_dq" if activations else "x", "w_dq")
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["w_dq"]), first, relu, last]
    if activations:
        relu.input[0] = "a_dq"
        nodes = [*around("x"), *nodes[:2], *around("a"), *nodes[2:]]
    scales = {"s": np.float32(0.03), "as": np.float32(0.1), "z": np.int8(0), "az": np.uint8(128)}
    stored = {"w": quantized(WIDE), "narrow.weight": NARROW} | {n: np.asarray(v) for n, v in scales.items()}
    return save(path, nodes, **stored)


def around(name: str) -> list[NodeProto]:
    """Quantize and dequantize a tensor: `a` becomes `a_dq`."""
    return [
        helper.make_node("QuantizeLinear", [name, "as", "az"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", "as", "az"], [f"{name}_dq"]),
    ]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_static_layer_that_the_engine_computes_in_integers_is_real(
    proof: Proof, tmp_path: Path, runtime: str
) -> None:
    program = static(tmp_path / "static.onnx", activations=True)
    coverage = proof(runtime, program, "static", [Skip(path="narrow", reason=LEFT)])
    assert coverage is not None
    wide, narrow = coverage.layers
    assert (wide.path, wide.op, wide.op_after, wide.shape) == ("wide", "MatMul", "MatMul", [64, 64])
    assert (wide.dtype, wide.bytes, wide.dtype_after, wide.bytes_after) == ("float32", 16384, "int8", 4096 + 4 + 1)
    assert (wide.computed_in, wide.reason) == ("int8", None)
    assert (narrow.dtype_after, narrow.bytes_after, narrow.computed_in) == ("float32", 1024, "float32")
    assert narrow.reason == LEFT
    assert (coverage.verdict, coverage.changed, coverage.total, coverage.integer) == ("REAL", 1, 2, 1)
    assert coverage.weight_share == 16384 / (16384 + 1024)
    assert coverage.why == (f"1 of 2 layers in int8, 94.1 % of the weight bytes; 1 computed in integers by {runtime}.")
    assert coverage_warnings(coverage, runtime) == []


def test_ranges_over_a_batch_are_said_of_dynamic_int8_alone() -> None:
    (warning,) = activation_range_warnings("dynamic", 32)
    assert "batches of 32" in warning
    assert activation_range_warnings("dynamic", 1) == activation_range_warnings("static", 32) == []


def test_integers_that_the_engine_unpacks_are_simulated_and_the_warning_says_what_to_try(
    proof: Proof, tmp_path: Path
) -> None:
    """Nothing quantizes the activation, so no engine can multiply in integers."""
    coverage = proof("onnxruntime", static(tmp_path / "static.onnx", activations=False), "static")
    assert coverage is not None
    assert coverage.layers[0].computed_in == "float32"
    assert (coverage.verdict, coverage.integer) == ("SIMULATED", 0)
    assert coverage.why.endswith("but only in storage: onnxruntime computes them in float32.")
    (warning,) = coverage_warnings(coverage, "onnxruntime")
    assert "onnxruntime computes 1 quantized layer in float32 (wide)" in warning
    assert "runtime openvino" in warning


def test_the_same_program_is_real_where_storage_was_the_aim(proof: Proof, tmp_path: Path) -> None:
    coverage = proof("onnxruntime", static(tmp_path / "static.onnx", activations=False), "weight_only")
    assert coverage is not None
    assert coverage.verdict == "REAL"
    assert coverage.why.endswith("in storage: onnxruntime computes them in float32.")
    assert coverage_warnings(coverage, "onnxruntime") == []


def test_a_dynamic_program_is_computed_in_integers_by_onnx_runtime(proof: Proof, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "dynamic.onnx"
    outcome = apply_to_program(source, target, Dynamic(), ProgramRun([], tmp_path))
    coverage = proof("onnxruntime", target, "dynamic", outcome.skipped)
    assert coverage is not None
    assert [(one.path, one.op_after, one.computed_in) for one in coverage.layers] == [
        ("wide", "MatMulInteger", "int8"),
        ("narrow", "MatMulInteger", "int8"),
    ]
    assert coverage.layers[0].bytes_after == 4096 + 64 * 4 + 64
    assert (coverage.verdict, coverage.integer) == ("REAL", 2)
    assert coverage.why == "2 of 2 layers in int8, all of the weight bytes; 2 computed in integers by onnxruntime."


def test_openvino_runs_the_dynamic_program_in_float_and_that_is_told(
    proof: Proof, source: Path, tmp_path: Path
) -> None:
    apply_to_program(source, tmp_path / "dynamic.onnx", Dynamic(), ProgramRun([], tmp_path))
    coverage = proof("openvino", tmp_path / "dynamic.onnx", "dynamic")
    assert coverage is not None
    assert (coverage.verdict, coverage.integer) == ("SIMULATED", 0)
    (warning,) = coverage_warnings(coverage, "openvino")
    assert "openvino computes 2 quantized layers in float32 (wide, narrow)" in warning
    assert "runtime onnxruntime" in warning


def test_a_program_that_nothing_was_changed_in_is_a_no_op_and_float32_has_no_coverage(
    proof: Proof, source: Path
) -> None:
    coverage = proof("onnxruntime", source, "dynamic")
    assert coverage is not None
    assert (coverage.verdict, coverage.changed, coverage.weight_share) == ("NO-OP", 0, 0.0)
    assert all(layer.reason for layer in coverage.layers)


def test_the_float32_program_on_another_engine_has_no_coverage(proof: Proof, source: Path) -> None:
    assert proof("onnxruntime", source, "fp32") is None


def test_an_engine_that_does_not_tell_leaves_it_open(source: Path, tmp_path: Path) -> None:
    program = static(tmp_path / "static.onnx", activations=True)
    save_program(tmp_path / "a", program, Manifest("onnxruntime", "int8", SIGNATURE), OutputCheck(SAMPLE, []))
    coverage = measure_coverage(FloatModel(source, None), tmp_path / "a", "static", [], [])
    assert coverage is not None
    assert (coverage.verdict, coverage.integer) == ("REAL", None)
    assert coverage.why.endswith("onnxruntime does not report their compute precision.")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("precision", "scheme", "expected"),
    [
        ("int8_dynamic", "dynamic", {"conv": ("float32", "float32"), "head": ("int8", "int8")}),
        ("bfloat16", "bf16", {"conv": ("bfloat16", "bfloat16"), "head": ("bfloat16", "bfloat16")}),
    ],
)
def test_a_torch_module_is_proved_from_its_file_and_its_reopened_layers(
    tmp_path: Path, precision: str, scheme: str, expected: dict[str, tuple[str, str]]
) -> None:
    module = Small().eval()
    converted = convert(copy.deepcopy(module), precision)
    manifest = Manifest("torch_eager", precision, SIGNATURE)
    save_module(tmp_path / "a", converted, Recipe("callable", "m.py:f", {}, "."), manifest, OutputCheck(SAMPLE, []))
    coverage = measure_coverage(FloatModel(None, module), tmp_path / "a", scheme, [], kernels_of(converted))
    assert coverage is not None
    assert {one.path: (one.dtype_after, one.computed_in) for one in coverage.layers} == expected
    assert coverage.verdict == "REAL"


def test_a_measuring_process_is_asked_and_one_that_is_gone_says_nothing(source: Path, tmp_path: Path) -> None:
    outputs = ENGINES["onnxruntime"].open(source, SIGNATURE, SessionSettings(1)).run(SAMPLE)
    save_program(tmp_path / "a", source, Manifest("onnxruntime", "float32", SIGNATURE), OutputCheck(SAMPLE, outputs))
    np.savez(tmp_path / "one.npz", x=SAMPLE["x"])
    setup = TimingSetup({"latency": tmp_path / "one.npz"}, 1, 1, tmp_path)
    with MeasuringProcess(tmp_path / "a", setup) as process:
        process.begin_open()
        process.end_open()
        kinds = {kernel.kind: kernel.computed_in for kernel in read_kernels(process)}
        assert "float32" in kinds.values()
        process._process.kill()
        assert read_kernels(process) == []


def recurrent_proof(tmp_path: Path, hidden: int, kernels: Sequence[Kernel]) -> Coverage:
    """A GRU whose weights are stored in int8 and dequantized before it, beside a product in int8."""
    sizes = {"w": (1, 3 * hidden, 64), "r": (1, 3 * hidden, hidden), "p": (hidden, 4)}
    weights = {name: np.ones(shape, np.float32) for name, shape in sizes.items()}

    def program(path: Path, stored: bool) -> Path:
        reads = {name: f"{name}_dq" if stored else name for name in weights}
        nodes = [helper.make_node("DequantizeLinear", [n, "s", "z"], [f"{n}_dq"]) for n in weights if stored]
        nodes += [
            helper.make_node("Unsqueeze", ["x", "first"], ["steps"]),
            helper.make_node("GRU", ["steps", reads["w"], reads["r"]], ["", "state"], "gru", hidden_size=hidden),
            helper.make_node("Squeeze", ["state", "first"], ["last"]),
            helper.make_node("MatMul", ["last", reads["p"]], ["y"], "product"),
        ]
        held = {n: v.astype(np.int8) if stored else v for n, v in weights.items()}
        extra = {"s": np.asarray(np.float32(1)), "z": np.asarray(np.int8(0))} if stored else {}
        return save(path, nodes, first=np.asarray([0]), **held, **extra)

    before, after = program(tmp_path / "before.onnx", False), program(tmp_path / "after.onnx", True)
    outputs = ENGINES["onnxruntime"].open(after, SIGNATURE, SessionSettings(1)).run(SAMPLE)
    save_program(tmp_path / "a", after, Manifest("onnxruntime", "int8", SIGNATURE), OutputCheck(SAMPLE, outputs))
    coverage = measure_coverage(FloatModel(before, None), tmp_path / "a", "dynamic", [], kernels)
    assert coverage is not None
    return coverage


def test_a_gru_in_int8_on_disk_that_the_engine_computes_in_float_is_not_real(tmp_path: Path) -> None:
    kernels = [Kernel("gru", "GRU", "float32"), Kernel("product", "MatMul", "int8")]
    coverage = recurrent_proof(tmp_path, 32, kernels)
    assert [one.dtype_after for one in coverage.layers] == ["int8", "int8"]
    assert coverage.verdict == "SIMULATED"
    (warning,) = coverage_warnings(coverage, "onnxruntime")
    assert "no engine here computes GRU in integers" in warning


def test_a_float32_copy_is_told_as_what_it_is_a_copy_of(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 4))
    converted = convert(copy.deepcopy(module), "bfloat16")
    session = ENGINES["torch_eager"].open(converted, SIGNATURE, SessionSettings(1, precision="bfloat16"))
    manifest = Manifest("torch_eager", "bfloat16", SIGNATURE)
    save_module(
        tmp_path / "a", converted, Recipe("callable", "m.py:net"), manifest, OutputCheck(SAMPLE, session.run(SAMPLE))
    )
    coverage = measure_coverage(FloatModel(None, module, "bfloat16"), tmp_path / "a", "bf16", [], kernels_of(converted))
    assert coverage is not None
    assert coverage.verdict == "NO-OP"
    assert (coverage.layers[0].dtype, coverage.layers[0].bytes) == ("bfloat16", 64 * 4 * 2)
