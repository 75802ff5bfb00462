from __future__ import annotations

import numpy as np
import onnx
from float_programs import program, weight
from onnx import helper

from omgoptim.models.onnx_graph import OnnxLayer, find_layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.qdq import stored_weights
from omgoptim.techniques.quantize._ptq import pipeline
from omgoptim.techniques.quantize._ptq.pipeline import affordable_prefixes, restore_float_layers
from omgoptim.techniques.quantize._ptq.state import PtqTask, apply_preset


def chain() -> onnx.ModelProto:
    """A stem of 1 x 2 channels whose taps cancel out, then 2 -> 64 -> 64 channels: 18 + 128 + 4096 weights a place."""
    rng = np.random.default_rng(0)
    taps = rng.uniform(-1, 1, (2, 1, 3, 3))
    taps -= taps.mean(axis=(2, 3), keepdims=True) - 1e-4
    shapes = {"wide": (64, 2, 1, 1), "deep": (64, 64, 1, 1)}
    weights = {"stem": taps} | {name: rng.uniform(-1, 1, shape) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Conv", ["a", "wide"], ["b"], "second"),
        helper.make_node("Conv", ["b", "deep"], ["y"], "third"),
    ]
    made = program(nodes, weights, ["batch", 1, 6, 6], ["batch", 64, 6, 6])
    return onnx.shape_inference.infer_shapes(made)


def test_prefixes_end_where_their_share_of_the_work_is_no_longer_small():
    model = chain()  # (18 + 128) / 4242 = 3.4 %, with the third all of it
    assert [[layer.node for layer in first] for first in affordable_prefixes(model, find_layers(model))] == [
        ["first"],
        ["first", "second"],
    ]


def test_a_program_of_unknown_shapes_has_no_prefix():
    model = chain()
    del model.graph.value_info[:]
    assert list(affordable_prefixes(model, find_layers(model))) == []


def test_a_restored_layer_has_its_own_weight_again_and_no_bias_that_was_added():
    model, changed = chain(), chain()
    for tensor in changed.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 2, tensor.name))
    changed.graph.node[0].input.append("new_bias")
    result = restore_float_layers(changed, model, find_layers(model)[:1])
    assert list(result.graph.node[0].input) == ["x", "stem"]
    np.testing.assert_array_equal(weight(result, "stem"), weight(model, "stem"))
    np.testing.assert_array_equal(weight(result, "wide"), weight(changed, "wide"))


def test_a_first_layer_that_makes_most_of_the_noise_stays_in_float_unless_targets_name_what_is_quantized():
    model = chain()
    rng = np.random.default_rng(1)
    data = [
        {"x": (rng.uniform(0, 6, (16, 1, 1, 1)) + 0.02 * rng.standard_normal((16, 1, 6, 6))).astype(np.float32)}
        for _ in range(4)
    ]
    for targets, left in (([], {"first"}), (["*"], set())):
        params = apply_preset(Static(algorithm="onnxruntime", targets=targets), "balanced")
        kept: list[OnnxLayer] = []
        quantized, notes = pipeline.quantize(model, data, PtqTask(find_layers(model), params), kept)
        assert {layer.node for layer in kept} & {"first"} == left
        assert ("first" in stored_weights(quantized)) is not bool(left)
        assert any("in float32" in note for note in notes) is bool(left)
