from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from omgoptim.errors import ModelError, TechniqueError
from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import count_params, find_layers, graph_traits, has_attention, select_layers
from omgoptim.requests.quantize import Bf16, Dynamic, Static


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gru", "encoder"])
def test_traits_describe_the_layers_of_the_network(program, name):
    traits = graph_traits(program(name).path)
    assert (traits.conv_weight_bytes > 0) == (name == "cnn")
    assert (traits.recurrent_weight_bytes > 0) == (name in ("lstm", "gru"))
    assert traits.has_gru == (name == "gru")
    assert has_attention(load(program(name).path)) == (name == "encoder")


def test_weight_bytes_are_those_of_the_modules(program):
    cnn = graph_traits(program("cnn").path)
    assert cnn.conv_weight_bytes == 4 * (16 * 9 + 32 * 16 * 9)
    assert cnn.matmul_weight_bytes == 4 * 10 * 32
    lstm = graph_traits(program("lstm").path)
    assert lstm.recurrent_weight_bytes == 4 * 4 * 128 * (16 + 128)
    assert lstm.matmul_weight_bytes == 4 * 5 * 128
    assert lstm.total_weight_bytes >= lstm.recurrent_weight_bytes + lstm.matmul_weight_bytes


@pytest.mark.parametrize("params", [Dynamic(), Static(algorithm="onnxruntime"), Bf16()])
def test_parameters_are_counted_alike_before_and_after_quantization(program, apply, params):
    before, _ = count_params(program("mlp").path)
    assert before == 32 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    target, _ = apply(program("mlp"), params)
    after, nonzero = count_params(target)
    assert after == before
    assert before * 0.98 < nonzero <= before


def test_zeros_are_not_counted_as_nonzero_in_float_nor_at_an_integers_zero_point(tmp_path):
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", "b"], ["output"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.array([[7, 7, 1], [9, 0, 9]], np.uint8), "q"),
            numpy_helper.from_array(np.ones(2, np.float32), "s"),
            numpy_helper.from_array(np.array([7, 9], np.uint8), "z"),
            numpy_helper.from_array(np.array([0, 1, 2], np.float32), "b"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    assert count_params(tmp_path / "m.onnx") == (9, 4)  # q: 1 of row 0 and 0 of row 1 differ; b: 1 and 2


def test_a_softmax_at_the_end_is_no_attention(tmp_path):
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Softmax", ["h"], ["p"]),
            helper.make_node("MatMul", ["p", "w"], ["output"]),  # a stored matrix, no other activation
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    assert not has_attention(load(tmp_path / "m.onnx"))


def test_layers_carry_the_paths_of_the_modules(program):
    found = find_layers(load(program("encoder").path))
    assert [(layer.op, layer.path) for layer in found if layer.op in ("Gather", "Gemm")] == [
        ("Gather", "emb"),
        ("Gemm", "layer.self_attn.out_proj"),
        ("Gemm", "head"),
    ]


def test_select_matches_a_path_or_a_module_around_it_and_ignore_wins(program):
    found = find_layers(load(program("encoder").path))
    paths = {layer.path for layer in select_layers(found, ["layer", "head"], ["layer.linear?"])}
    assert paths == {"layer.self_attn", "layer.self_attn.out_proj", "head"}
    with pytest.raises(TechniqueError, match="matches no layer"):
        select_layers(found, ["decoder"], [])


def test_a_file_that_is_no_onnx_is_a_model_error(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a program")
    with pytest.raises(ModelError, match="not a readable ONNX file"):
        graph_traits(tmp_path / "m.onnx")


def test_a_lookup_in_a_copy_of_a_tied_weight_is_named_by_its_own_module():
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["head.weight", "ids"], ["h"], "node_embedding"),
            helper.make_node("MatMul", ["h", "head.weight_Transposed"], ["output"], "node_linear"),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2, 5])],
        [
            numpy_helper.from_array(np.ones((5, 3), np.float32), "head.weight"),
            numpy_helper.from_array(np.ones((3, 5), np.float32), "head.weight_Transposed"),
        ],
    )
    found = find_layers(helper.make_model(graph), {"node_embedding": "table", "node_linear": "head"})
    assert [layer.path for layer in found] == ["table", "head"]
