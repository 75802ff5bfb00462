from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from omgoptim.errors import TechniqueError
from omgoptim.requests.quantize import Bf16


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gru", "encoder"])
def test_every_engine_opens_the_file_and_the_output_stays(program, apply, cosine, name, engine):
    pytest.importorskip(engine)
    target, outcome = apply(program(name), Bf16())
    assert outcome.changed
    assert cosine(program(name), target, engine) > 0.9999


def test_the_large_weights_take_half_the_bytes(program, apply):
    target, outcome = apply(program("lstm"), Bf16())
    sizes = [
        sum(numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(str(path)).graph.initializer)
        for path in (program("lstm").path, target)
    ]
    assert sizes[0] / sizes[1] > 1.95
    assert any(change.path.startswith("rnn") for change in outcome.changed)


def test_a_program_older_than_bfloat16_is_raised_to_the_opset_that_has_it(program, apply, tmp_path):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["output"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(np.eye(32, dtype=np.float32), "w")],
    )
    source = type(program("mlp"))(tmp_path / "old.onnx", program("mlp").sample)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), str(source.path))
    target, _ = apply(source, Bf16())
    assert onnx.load(str(target)).opset_import[0].version == 13


def test_a_layer_too_small_to_gain_is_skipped_with_its_bytes(program, apply, tmp_path):
    eye = np.eye(32, dtype=np.float32)
    weights = [numpy_helper.from_array(eye, "a"), numpy_helper.from_array(eye[:, :2], "b")]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"], "large"),
            helper.make_node("MatMul", ["h", "b"], ["output"], "small"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        weights,
    )
    source = type(program("mlp"))(tmp_path / "two.onnx", program("mlp").sample)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(source.path))
    _, outcome = apply(source, Bf16())
    assert len(outcome.changed) == len(outcome.skipped) == 1
    assert outcome.skipped[0].kind == "no_benefit"
    assert "256 bytes" in outcome.skipped[0].reason
    assert outcome.skipped[0].path != outcome.changed[0].path


def test_a_program_without_large_weights_is_an_error(program, apply, tmp_path):
    source = type(program("mlp"))(tmp_path / "none.onnx", program("mlp").sample)
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["output"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 32])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(source.path))
    with pytest.raises(TechniqueError, match="no weight"):
        apply(source, Bf16())
