from __future__ import annotations

import os
import sys

import numpy as np
import onnx
import pytest

from omgoptim.errors import TechniqueError
from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import find_layers
from omgoptim.requests.quantize import Bf16, Dynamic, Fp16, Static
from omgoptim.techniques.quantize._onnx import program as program_module
from omgoptim.techniques.quantize._ptq import backends

SCHEMES = [Dynamic(), Static(algorithm="onnxruntime"), Bf16(), Fp16()]
if backends.has_nncf():
    SCHEMES.append(Static(algorithm="nncf"))


@pytest.mark.parametrize("params", SCHEMES, ids=str)
def test_a_model_past_the_limit_of_one_file_keeps_its_weights_beside_it(program, apply, cosine, monkeypatch, params):
    monkeypatch.setattr("omgoptim.models.onnx_file.MAX_ONE_FILE_BYTES", 2000)  # the real limit is 2 GiB
    target, outcome = apply(program("mlp"), params)
    assert target.with_name("target.onnx.data").stat().st_size > 4000
    assert outcome.changed
    assert cosine(program("mlp"), target) > 0.999


def test_a_rewrite_that_loses_an_output_is_an_error(program, tmp_path):
    model = load(program("mlp").path)
    del model.graph.output[:]
    with pytest.raises(TechniqueError, match="changed its inputs or outputs"):
        program_module.finish(model, load(program("mlp").path), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_an_invalid_rewrite_is_an_error(program, tmp_path):
    model = load(program("mlp").path)
    model.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(TechniqueError, match="not valid ONNX"):
        program_module.finish(model, load(program("mlp").path), tmp_path / "out.onnx")


def test_constants_and_unnamed_nodes_of_a_users_file_are_put_in_order(program, tmp_path):
    model = onnx.load(str(program("mlp").path))
    tensor = model.graph.initializer[0]
    name = tensor.name
    tensor.name = ""
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=tensor))
    del model.graph.initializer[0]
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, str(tmp_path / "user.onnx"))
    loaded = load(tmp_path / "user.onnx")
    assert name in {t.name for t in loaded.graph.initializer}
    assert all(node.op_type != "Constant" for node in loaded.graph.node)
    assert len({node.name for node in loaded.graph.node} - {""}) == len(loaded.graph.node)


def test_initializers_that_an_old_file_lists_as_inputs_are_no_inputs(program, tmp_path):
    model = onnx.load(str(program("mlp").path))
    model.graph.input.append(onnx.helper.make_tensor_value_info("head.bias", onnx.TensorProto.FLOAT, [10]))
    onnx.save(model, str(tmp_path / "old.onnx"))
    assert [value.name for value in load(tmp_path / "old.onnx").graph.input] == ["x"]


def test_stdout_is_led_to_stderr_at_descriptor_level_and_put_back(capfd):
    with program_module.quiet_stdout():
        os.write(1, b"from C\n")
        print("from Python", file=sys.__stdout__, flush=True)
    os.write(1, b"after\n")
    out, err = capfd.readouterr()
    assert out == "after\n"
    assert "from C" in err


def test_a_layer_known_by_its_weights_name_keeps_its_path_and_every_name_stays_readable(tmp_path):
    weight = onnx.numpy_helper.from_array(np.array([[1], [2]], np.int8), "body.linear.weight_quantized")
    scale = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "body.linear.weight_scale")
    nodes = [
        onnx.helper.make_node("DequantizeLinear", [weight.name, scale.name], ["w"], "w_DequantizeLinear"),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "node_MatMul_7"),
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 2), ("y", 1))
    ]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [weight, scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    assert [layer.path for layer in find_layers(model)] == ["body.linear"]
    source = onnx.ModelProto.FromString(model.SerializeToString())
    program_module.finish(model, source, tmp_path / "made.onnx")
    made = load(tmp_path / "made.onnx")
    assert [tensor.name for tensor in made.graph.initializer] == [weight.name, scale.name]
    assert [node.name for node in made.graph.node] == ["w_DequantizeLinear", "node_MatMul_7"]
    assert [layer.path for layer in find_layers(made)] == ["body.linear"]


def test_equal_scales_and_zero_points_are_stored_once_and_nothing_else_changes(program, apply, monkeypatch):
    shared = load(apply(program("cnn"), Static(algorithm="onnxruntime"))[0])
    monkeypatch.setattr(program_module, "_share_scales", lambda _model: None)
    target, _ = apply(program("cnn"), Static(algorithm="onnxruntime"))
    apart = load(target)

    def contents(model):
        return [
            (tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes())
            for tensor in model.graph.initializer
        ]

    assert len(contents(shared)) < len(contents(apart))
    assert set(contents(shared)) == set(contents(apart))
    assert [node.name for node in shared.graph.node] == [node.name for node in apart.graph.node]
    assert {tensor.name for tensor in shared.graph.initializer} < {tensor.name for tensor in apart.graph.initializer}
    assert shared.ByteSize() < apart.ByteSize()
    feeds = {shared.graph.input[0].name: program("cnn").sample(4, 3)}
    outputs = [program_module.open_program(model, 1).run(None, feeds)[0] for model in (shared, apart)]
    np.testing.assert_array_equal(*outputs)
