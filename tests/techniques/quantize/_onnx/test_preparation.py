from __future__ import annotations

import numpy as np
import pytest
from float_programs import gemm, program, relu, run, weight
from onnx import helper

from omgoptim.techniques.quantize._onnx.preparation import fold_batch_norms


def norm(x: str, y: str) -> object:
    return helper.make_node("BatchNormalization", [x, "scale", "shift", "mean", "variance"], [y], epsilon=0.0)


NORM = {"scale": [2, 3], "shift": [1, -1], "mean": [4, 0], "variance": [4, 9]}


def test_a_norm_after_a_gemm_becomes_its_weights_by_hand():
    weights = {"w": [[1, 2], [3, 4]], "b": [4, 1], **NORM}
    model = program([gemm("x", "w", "b", "h"), norm("h", "y")], weights, ["batch", 2], ["batch", 2])
    want = run(model, np.array([[1, -1], [0, 2]]))
    assert fold_batch_norms(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Gemm"]
    np.testing.assert_allclose(weight(model, "w"), [[1, 2], [3, 4]])  # 2 / sqrt(4) and 3 / sqrt(9)
    np.testing.assert_allclose(weight(model, "b"), [1, 0])  # 4 - 4 + 1 and 1 - 0 - 1
    np.testing.assert_allclose(run(model, np.array([[1, -1], [0, 2]])), want, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_after_a_transposed_convolution_keeps_the_function(groups):
    rng = np.random.default_rng(0)
    up = helper.make_node("ConvTranspose", ["x", "w"], ["h"], strides=[2, 2], group=groups)
    weights = {"w": rng.standard_normal((4, 2 // groups, 2, 2)), **NORM}
    model = program([up, norm("h", "n"), relu("n", "y")], weights, ["batch", 4, 3, 3], ["batch", 2, 6, 6])
    x = rng.standard_normal((2, 4, 3, 3))
    want = run(model, x)
    assert fold_batch_norms(model) == 1
    np.testing.assert_allclose(run(model, x), want, atol=1e-5)


def test_a_norm_behind_a_relu_or_beside_another_reader_stays():
    weights = {"w": [[1, 2], [3, 4]], "b": [4, 1], **NORM}
    behind = [gemm("x", "w", "b", "h"), relu("h", "a"), norm("a", "y")]
    beside = [gemm("x", "w", "b", "h"), norm("h", "n"), helper.make_node("Add", ["h", "n"], ["y"])]
    for nodes in (behind, beside):
        model = program(nodes, weights, ["batch", 2], ["batch", 2])
        assert fold_batch_norms(model) == 0
        assert len(model.graph.node) == 3
