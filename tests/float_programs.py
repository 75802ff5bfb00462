"""Float ONNX programs written node by node, and running them: for tests whose oracle is a matrix by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

Array = NDArray[Any]


def program(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, Any], x: Sequence[int | str], y: Sequence[int | str]
) -> ModelProto:
    """A program from `x` to `y` with float32 weights, its shapes inferred; nodes are named after their output."""
    for node in nodes:
        node.name = node.name or f"make_{node.output[0]}"
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", float32, x)],
        [helper.make_tensor_value_info("y", float32, y)],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def gemm(x: str, w: str, b: str, y: str) -> onnx.NodeProto:
    """y = x w^T + b: w is (out, in), as torch has it."""
    return helper.make_node("Gemm", [x, w, b] if b else [x, w], [y], transB=1)


def relu(x: str, y: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [x], [y])


def two_layers(w1: Any, b1: Any, w2: Any, b2: Any) -> ModelProto:
    """Gemm, ReLU, Gemm."""
    nodes = [gemm("x", "w1", "b1", "h"), relu("h", "a"), gemm("a", "w2", "b2", "y")]
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return program(nodes, weights, ["batch", np.shape(w1)[1]], ["batch", np.shape(w2)[0]])


def weight(model: ModelProto, name: str) -> Array:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def run(model: ModelProto, x: Array, name: str = "y") -> Array:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"x": x.astype(np.float32)})[0])
