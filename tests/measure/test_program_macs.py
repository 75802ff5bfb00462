"""Multiply-accumulates of programs: against those of the module they came from, and by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from omgoptim.measure.macs import count_macs
from omgoptim.measure.program_macs import count_program
from omgoptim.requests.quantize import Dynamic, Static
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature
from omgoptim.techniques.registry import ProgramRun, technique_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.up(self.down(self.body(x))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(128, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x):
        return self.layers(self.first(x)).mean(1)


MODULES = {"cnn": (Cnn, (1, 8, 8)), "recurrent": (Recurrent, (7, 6)), "encoder": (Encoder, (5, 6))}


@pytest.fixture
def exported(tmp_path):
    """`exported(name)`: the module, its program and one sample."""

    def make(name):
        torch.manual_seed(0)
        build, shape = MODULES[name]
        module = build().eval()
        signature = Signature((InputTensor("x", "float32", (BATCH, *shape), False),), "tensor")
        export_onnx(module, {"x": torch.randn(2, *shape)}, signature, tmp_path / f"{name}.onnx")
        return module, tmp_path / f"{name}.onnx", np.random.default_rng(0).standard_normal((1, *shape), np.float32)

    return make


@pytest.mark.parametrize("name", MODULES)
def test_a_program_counts_exactly_as_the_module_it_was_exported_from(exported, name):
    module, path, sample = exported(name)
    count = count_program(path, {"x": sample})
    assert count.macs == count_macs(module, (torch.from_numpy(sample),), {}).macs
    assert sum(count.by_node.values()) == count.macs


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("recurrent", Dynamic()),
        ("encoder", Dynamic()),
        ("cnn", Static(algorithm="onnxruntime")),
    ],
    ids=lambda value: getattr(value, "scheme", value),
)
def test_a_quantized_program_counts_as_the_float_one(exported, tmp_path, name, params):
    _, path, sample = exported(name)
    float_ops = {node.op_type for node in onnx.load(path).graph.node}
    (tmp_path / "scratch").mkdir()
    target = tmp_path / "quantized.onnx"
    run = ProgramRun([{"x": np.repeat(sample, 8, 0)}], tmp_path / "scratch")
    technique_of(params).apply(path, target, params, run)
    assert {node.op_type for node in onnx.load(target).graph.node} - float_ops
    assert count_program(target, {"x": sample}).macs == count_program(path, {"x": sample}).macs


def floats(*shape):
    return np.ones(shape, np.float32)


@pytest.fixture
def count(tmp_path):
    """`count(nodes, inputs, **weights)`: of a program whose inputs have these arrays' shapes, or those of `stated`."""

    def of(nodes, inputs, stated=None, domains=(), **weights):
        values = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(x.dtype), (stated or {}).get(name, ["n", *x.shape[1:]])
            )
            for name, x in inputs.items()
        ]
        output = nodes[-1].output[0]
        graph = helper.make_graph(
            nodes,
            "g",
            values,
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        )
        opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "hand.onnx")
        return count_program(tmp_path / "hand.onnx", inputs)

    return of


node = helper.make_node


@pytest.mark.parametrize(
    ("proto", "x", "weights", "expected"),
    [
        (node("Conv", ["x", "w"], ["y"], group=2, strides=[2, 2]), (1, 4, 9, 9), [(6, 2, 3, 3)], 4 * 4 * 6 * 2 * 9),
        (node("Conv", ["x", "w"], ["y"]), (1, 3, 10), [(4, 3, 5)], 6 * 4 * 3 * 5),
        (node("ConvTranspose", ["x", "w"], ["y"], group=2, strides=[2, 2]), (1, 4, 5, 5), [(4, 3, 3, 3)], 25 * 4 * 27),
        (node("Gemm", ["x", "w"], ["y"]), (1, 4), [(4, 5)], 20),
        (node("Gemm", ["x", "w"], ["y"], transB=1), (1, 4), [(5, 4)], 20),
        (node("Gemm", ["x", "w"], ["y"], transA=1), (1, 4), [(1, 5)], 4 * 5),
        (node("MatMul", ["x", "w"], ["y"]), (1, 3, 4), [(4, 5)], 3 * 4 * 5),
        (node("MatMul", ["x", "w"], ["y"]), (1, 3, 4), [(7, 4, 5)], 7 * 3 * 4 * 5),
        (node("MatMul", ["x", "w"], ["y"]), (1, 3, 4), [(4,)], 3 * 4),
        (node("Einsum", ["x", "w"], ["y"], equation="bij,jk->bik"), (1, 3, 4), [(4, 5)], 3 * 4 * 5),
        (node("Einsum", ["x"], ["y"], equation="bij->bji"), (1, 3, 4), [], 0),
        (node("LSTM", ["x", "w", "r"], ["y"], hidden_size=5), (1, 2, 4), [(1, 20, 4), (1, 20, 5)], 2 * 20 * 9),
        (node("GRU", ["x", "w", "r"], ["y"], hidden_size=5), (1, 2, 4), [(1, 15, 4), (1, 15, 5)], 2 * 15 * 9),
        (node("Relu", ["x"], ["y"]), (1, 3), [], 0),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_each_operator_costs_its_formula(count, proto, x, weights, expected):
    named = dict(zip(("w", "r"), (floats(*shape) for shape in weights), strict=False))
    assert count([proto], {"x": floats(*x)}, **named).macs == expected


def test_integer_products_cost_what_those_of_floats_do(count):
    to_float = node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)
    x = np.ones((1, 3, 4), np.uint8)
    product = [node("MatMulInteger", ["x", "w"], ["i"]), to_float]
    assert count(product, {"x": x}, w=np.ones((4, 5), np.int8)).macs == 3 * 4 * 5
    image = np.ones((1, 2, 5, 5), np.uint8)
    convolution = [node("ConvInteger", ["x", "w"], ["i"]), to_float]
    assert count(convolution, {"x": image}, w=np.ones((3, 2, 3, 3), np.uint8)).macs == 3 * 3 * 3 * 2 * 9


def test_a_shape_that_inference_leaves_open_is_found_by_running(count):
    nodes = [
        node("NonZero", ["x"], ["where"]),
        node("Transpose", ["where"], ["rows"], perm=[1, 0]),
        node("Cast", ["rows"], ["float_rows"], to=TensorProto.FLOAT),
        node("MatMul", ["float_rows", "w"], ["y"]),
    ]
    x = np.array([[1, 0, 2, 3]], np.float32)
    assert count(nodes, {"x": x}, w=floats(2, 7)).macs == 3 * 2 * 7  # three entries are not zero


def test_a_loops_body_with_a_product_is_not_counted_and_the_reason_is_logged(count, caplog):
    inside = helper.make_graph(
        [node("MatMul", ["state", "w"], ["next"]), node("Identity", ["more"], ["again"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 4]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, 4]),
        ],
    )
    loop = node("Loop", ["times", "go", "x"], ["y"], body=inside, name="loop")
    found = count([loop], {"x": floats(1, 4)}, w=floats(4, 4), times=np.int64(3), go=np.bool_(True))
    assert (found.macs, found.by_node) == (None, {})
    assert "iterations of Loop loop" in str(found.reason)
    assert "iterations of Loop loop" in caplog.text


@pytest.mark.parametrize(
    ("nodes", "domains", "reason"),
    [
        ([node("Mystery", ["x"], ["y"], domain="some.where")], ["some.where"], "operator some.where"),
        ([node("MultiHeadAttention", ["x"], ["y"], domain="com.microsoft")], ["com.microsoft"], "MultiHeadAttention"),
        ([node("Einsum", ["x", "x", "x"], ["y"], equation="ab,ab,ab->a")], [], "Einsum ab,ab,ab->a is not supported"),
        ([node("Mystery", ["x"], ["z"]), node("MatMul", ["z", "x"], ["y"])], [], "the shape of"),
    ],
    ids=["domain", "contrib", "einsum", "cannot run"],
)
def test_what_cannot_be_counted_is_none_with_its_reason(count, nodes, domains, reason):
    found = count(nodes, {"x": floats(1, 4)}, domains=domains)
    assert found.macs is None
    assert reason in str(found.reason)


def test_an_lstm_whose_steps_depend_on_lengths_is_not_counted(count):
    lstm = node("LSTM", ["x", "w", "r", "", "lengths"], ["y"], hidden_size=5)
    found = count(
        [lstm], {"x": floats(1, 1, 4)}, w=floats(1, 20, 4), r=floats(1, 20, 5), lengths=np.array([1], np.int32)
    )
    assert found.macs is None
    assert "sequence lengths" in str(found.reason)


def test_a_program_for_a_fixed_batch_is_not_counted_for_one_sample(count):
    found = count([node("Gemm", ["x", "w"], ["y"])], {"x": floats(1, 4)}, stated={"x": [8, 4]}, w=floats(4, 5))
    assert found.macs is None
    assert "[8, 4]" in str(found.reason)


def test_an_input_that_the_sample_lacks_is_a_reason_and_no_crash(count, tmp_path):
    count([node("Gemm", ["x", "w"], ["y"])], {"x": floats(1, 4)}, w=floats(4, 5))
    assert "no input 'x'" in str(count_program(tmp_path / "hand.onnx", {"other": floats(1, 4)}).reason)


def test_a_file_that_is_no_program_is_a_reason(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no")
    assert count_program(tmp_path / "no.onnx", {}).macs is None
