from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from omgoptim.models.onnx_file import SCOPES
from omgoptim.techniques.quantize.short_names import shorten

onnxruntime = pytest.importorskip("onnxruntime")


def program() -> onnx.ModelProto:
    """y = (x quantized and back, twice, by equal scales) + a weight."""
    weight = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "body.weight")
    scales = [numpy_helper.from_array(np.array(0.5, np.float32), f"the.scale.of.{name}") for name in ("x", "again")]
    zeros = [numpy_helper.from_array(np.array(0, np.int8), f"the.zero.point.of.{name}") for name in ("x", "again")]
    nodes = []
    for name, scale, zero in (("x", scales[0], zeros[0]), ("again", scales[1], zeros[1])):
        around, back = [scale.name, zero.name], "again" if name == "x" else "back.again"
        made = f"{name}_quantized_linear"
        nodes.append(helper.make_node("QuantizeLinear", [name, *around], [made], f"{name}_QuantizeLinear"))
        nodes.append(helper.make_node("DequantizeLinear", [made, *around], [back], f"{name}_DequantizeLinear"))
    nodes.append(helper.make_node("Add", ["back.again", "body.weight"], ["y"], "body"))
    nodes[4].metadata_props.add(key=SCOPES, value="['', 'body']")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight, *scales, *zeros])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": np.array([0.3, -1.2], np.float32)})[0]


def test_a_program_with_short_names_is_smaller_and_gives_the_same() -> None:
    model = program()
    expected, size = run(model), model.ByteSize()
    shorten(model)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(run(model), expected)
    assert model.ByteSize() < 0.6 * size
    assert len(model.graph.initializer) == 3
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    assert {name for name in names if len(name) > 1} == {"body.weight"}


def test_inputs_outputs_weights_and_layers_keep_their_names() -> None:
    model = program()
    shorten(model)
    assert [model.graph.input[0].name, model.graph.output[0].name] == ["x", "y"]
    assert [node.name for node in model.graph.node] == ["", "", "", "", "body"]
    assert model.graph.node[4].metadata_props[0].value == "['', 'body']"


def test_a_program_with_a_body_inside_of_a_node_is_left_alone() -> None:
    model = program()
    body = helper.make_graph(
        [helper.make_node("Identity", ["body.weight"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2])],
    )
    condition = numpy_helper.from_array(np.array(True), "condition")
    model.graph.initializer.append(condition)
    model.graph.node.append(helper.make_node("If", ["condition"], ["unused"], then_branch=body, else_branch=body))
    before = model.SerializeToString(deterministic=True)
    shorten(model)
    assert model.SerializeToString(deterministic=True) == before
