from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from omgoptim.models.onnx_graph import find_layers
from omgoptim.techniques.quantize._onnx.weight_storage import quantize_embeddings, quantize_rows


def test_rows_have_the_scales_computed_by_hand():
    weight = np.array([[1.27, -0.635], [0.0, 0.0]], np.float32)
    values, scales = quantize_rows(weight, per_row=True)
    np.testing.assert_allclose(scales, [[0.01], [1.0]])
    np.testing.assert_array_equal(values, [[127, -64], [0, 0]])  # -63.5 to the even -64


def test_one_scale_for_all_rows_is_the_largest_value_over_127():
    values, scales = quantize_rows(np.array([[2.54, 0.0], [0.0, -0.2]], np.float32), per_row=False)
    np.testing.assert_allclose(scales, [[0.02]])
    np.testing.assert_array_equal(values, [[127, 0], [0, -10]])


def lookup_model(index_shape: list[str]) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "x"], ["output"], "look")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, index_shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [*index_shape, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_lookup_gives_the_rows_within_half_a_step_for_indices_of_any_rank():
    import onnxruntime

    for shape, ids in (([], np.array(3)), (["n"], np.array([5, 0])), (["b", "s"], np.array([[1, 2, -1]]))):
        for per_row in (True, False):
            model = lookup_model(shape)
            weight = numpy_helper.to_array(model.graph.initializer[0])
            quantize_embeddings(model, find_layers(model), per_row)
            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            (got,) = session.run(None, {"x": ids})
            assert got.shape == weight[ids].shape
            assert np.abs(got - weight[ids]).max() <= np.abs(weight).max() / 127 / 2 + 1e-6
