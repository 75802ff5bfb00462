"""Parameters of a model, and storage dtype and bytes of its layers, counted by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from omgoptim.measure.size import count_params, module_layers, saved_layers, stored_layers
from omgoptim.models.artifact import save_module
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature
from omgoptim.runtimes.torch_precision import convert


def test_parameters_and_those_that_are_not_zero_are_counted():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, -3.0]]))
        layer.bias.copy_(torch.tensor([0.0, -0.0]))
    assert count_params(layer) == (8, 3)


def test_a_tied_weight_counts_once_whether_shared_as_parameter_or_as_memory():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(4, 7, bias=False))
    assert count_params(net)[0] == 84
    net[1].weight = net[0].weight
    assert count_params(net)[0] == 56
    net[2].weight = nn.Parameter(net[0].weight.data)
    assert count_params(net)[0] == 28


def test_views_of_one_memory_with_other_shapes_and_empty_parameters_stay_apart():
    net = nn.ParameterList([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))])
    assert count_params(net) == (2, 2)


def test_buffers_are_no_parameters():
    assert count_params(nn.BatchNorm2d(4, affine=False)) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype_is_counted(dtype):
    net = nn.ParameterList([nn.Parameter(torch.tensor([0, 1, 2], dtype=dtype))])
    assert count_params(net) == (3, 2)


def test_measuring_files_needs_no_torch():
    code = "import sys, omgoptim.measure.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


Stored = dict[str, np.ndarray]


def program(nodes: list[NodeProto], **stored: np.ndarray) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors))


def integers(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int8)


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_float_layer_is_its_weight_without_its_bias() -> None:
    (layer,) = stored_layers(
        program([helper.make_node("Gemm", ["x", "w", "b"], ["y"], "n")], w=floats(3, 2), b=floats(2))
    )
    assert (layer.path, layer.op, layer.nodes, layer.shape) == ("n", "Gemm", ("n",), (3, 2))
    assert (layer.dtype, layer.bytes) == ("float32", 24)


def test_the_scales_and_zero_points_of_an_integer_weight_count_and_those_of_activations_do_not() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=1),
        helper.make_node("MatMul", ["a", "f"], ["y"], "n"),
    ]
    activation = {"xs": floats(1), "xz": np.ones(1, np.uint8)}
    (layer,) = stored_layers(program(nodes, w=integers(3, 2), s=floats(2), z=integers(2), **activation))
    assert (layer.dtype, layer.bytes) == ("int8", 6 + 8 + 2)
    assert set(layer.tensors) == {"w", "s", "z"}


def test_the_scale_of_an_integer_product_is_found_behind_its_cast() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["q", "w", "xz", "z"], ["i"], "n"),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    (layer,) = stored_layers(program(nodes, w=integers(3, 2), s=floats(2), z=integers(2)))
    assert set(layer.tensors) == {"w", "s", "z"}
    assert layer.bytes == 6 + 8 + 2


def test_the_scales_of_rows_that_are_looked_up_are_found() -> None:
    nodes = [
        helper.make_node("Gather", ["w", "x"], ["q"], "rows"),
        helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["s", "x"], ["r"], "scales"),
        helper.make_node("Mul", ["f", "r"], ["y"]),
    ]
    layers = {layer.path: layer for layer in stored_layers(program(nodes, w=integers(5, 4), s=floats(5, 1)))}
    assert layers["rows"].dtype == "int8"
    assert layers["rows"].bytes == 20 + 20


def test_recurrent_weights_behind_a_cast_are_integers_with_their_scales() -> None:
    nodes = [node for name in ("w", "r") for node in _unpacked(name)]
    nodes.append(helper.make_node("GRU", ["x", "w_f", "r_f"], ["y"], "n", hidden_size=2))
    stored = {"w": integers(1, 6, 3), "r": integers(1, 6, 2), "w_s": floats(1, 6, 1), "r_s": floats(1, 6, 1)}
    (layer,) = stored_layers(program(nodes, **stored))
    assert (layer.op, layer.dtype, layer.bytes) == ("GRU", "int8", 18 + 12 + 24 + 24)


def _unpacked(name: str) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [name], [f"{name}_c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_c", f"{name}_s"], [f"{name}_f"]),
    ]


def test_a_weight_in_four_bits_takes_half_a_byte_each() -> None:
    tensor = helper.make_tensor("w", TensorProto.UINT4, [32, 2], np.ones(64, np.int8))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"], axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "f"], ["y"], "n"),
    ]
    model = program(nodes, s=floats(2, 2))
    model.graph.initializer.append(tensor)
    (layer,) = stored_layers(model)
    assert (layer.dtype, layer.bytes) == ("uint4", 32 + 16)


def test_a_weight_in_sixteen_bits_is_reported_by_its_stored_type() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"], "n"),
    ]
    (layer,) = stored_layers(program(nodes, w=np.ones((3, 2), np.float16)))
    assert (layer.dtype, layer.bytes) == ("float16", 12)


def test_nodes_that_share_a_weight_of_one_path_are_one_layer_that_counts_it_once() -> None:
    nodes = [helper.make_node("MatMul", ["x", "cell.weight"], [f"y{i}"], f"n{i}") for i in range(2)]
    (layer,) = stored_layers(program(nodes, **{"cell.weight": floats(3, 2)}), {"n0": "cell", "n1": "cell"})
    assert (layer.path, layer.nodes, layer.bytes) == ("cell", ("n0", "n1"), 24)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.rnn(self.conv(x).transpose(1, 2))
        return self.again(self.head(self.norm(hidden)))  # type: ignore[no-any-return]


def test_the_layers_of_a_module_are_those_with_a_matrix_and_a_tied_one_has_one_name() -> None:
    layers = {layer.path: layer for layer in module_layers(Tied())}
    assert set(layers) == {"conv", "rnn", "head", "again"}
    assert layers["rnn"].bytes == 2 * 12 * 4 * 4
    assert layers["again"].tensors == layers["head"].tensors == {"head.weight": 64}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("precision", "gru", "linear"),
    [
        ("int8_dynamic", ("int8", 2 * (48 + 12 * 8)), ("int8", 16 + 4 * 8)),
        ("bfloat16", ("bfloat16", 192), ("bfloat16", 32)),
    ],
)
def test_a_saved_modules_layers_are_read_off_its_file(
    tmp_path: Path, precision: str, gru: tuple[str, int], linear: tuple[str, int]
) -> None:
    module = Tied().eval()
    before = module_layers(module)
    converted = convert(copy.deepcopy(module), precision)
    signature = Signature((InputTensor("x", "float32", (BATCH, 4, 4), False),), "tensor")
    check = OutputCheck({"x": floats(1, 4, 4)}, [])
    save_module(
        tmp_path / "a",
        converted,
        Recipe("callable", "m.py:f", {}, "."),
        Manifest("torch_eager", precision, signature),
        check,
    )
    after = {layer.path: layer for layer in saved_layers(tmp_path / "a", before)}
    assert (after["rnn"].dtype, after["rnn"].bytes) == gru
    assert (after["head"].dtype, after["head"].bytes) == linear
    assert after["conv"].dtype == ("bfloat16" if precision == "bfloat16" else "float32")


def test_weights_packed_around_their_zeros_keep_their_type(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False))
    before = module_layers(module)
    half = convert(copy.deepcopy(module), "bfloat16")
    with torch.no_grad():
        half[0].weight[:48] = 0  # type: ignore[index,operator]
    signature = Signature((InputTensor("x", "float32", (BATCH, 64), False),), "tensor")
    manifest, check = Manifest("torch_eager", "bfloat16", signature), OutputCheck({"x": floats(1, 64)}, [])
    save_module(tmp_path / "a", half, Recipe("callable", "m.py:f", {}, "."), manifest, check)
    (layer,) = saved_layers(tmp_path / "a", before)
    assert layer.dtype == "bfloat16"
    assert layer.bytes == 64 * 64 // 8 + 16 * 64 * 2
