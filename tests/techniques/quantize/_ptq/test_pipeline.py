"""PTQ pipeline: each step is kept only if it helps, and cheap first layers stay in float."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import onnx
import pytest
from float_programs import gemm, program, relu, run, two_layers, weight
from onnx import helper

from omgoptim.errors import DataError
from omgoptim.models.onnx_graph import OnnxLayer, find_layers, is_mixed_precision
from omgoptim.requests.quantize import Static
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.quantize._onnx.program import open_program
from omgoptim.techniques.quantize._onnx.qdq import stored_weights, write_qdq
from omgoptim.techniques.quantize._ptq import pipeline
from omgoptim.techniques.quantize._ptq.adaround import apply_adaround, round_small_kernels
from omgoptim.techniques.quantize._ptq.bias_correction import correct_biases
from omgoptim.techniques.quantize._ptq.calibration import outputs, size_of, split
from omgoptim.techniques.quantize._ptq.observers import compute_ranges, observe_activations
from omgoptim.techniques.quantize._ptq.pipeline import affordable_prefixes, restore_float_layers
from omgoptim.techniques.quantize._ptq.state import PtqTask, apply_preset, sqnr_db

PLAIN = apply_preset(Static(algorithm="onnxruntime"), "fast")


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
    result = restore_float_layers(changed, model, ["first"])
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


def batches(seed: int, *shape: int, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(shape, dtype=np.float32)} for _ in range(count)]


def test_weights_are_stored_by_their_largest_value_over_127():
    model = two_layers([[12.7, 1.0], [0.5, -0.254]], [0, 0], [[1.27, 0.634]], [0])
    ranges = compute_ranges(observe_activations(model, batches(0, 8, 2)), "minmax")
    stored = stored_weights(write_qdq(model, find_layers(model), ranges, PLAIN))
    np.testing.assert_array_equal(stored["make_h"].integers, [[127, 10], [127, -65]])  # 64.5 steps, to the even one off
    np.testing.assert_allclose(stored["make_h"].scales, [[0.1], [0.5 / 127]], rtol=1e-6)
    np.testing.assert_array_equal(stored["make_y"].integers, [[127, 63]])


def test_a_bias_takes_the_mean_error_of_the_rounded_weights_back():
    # s = 1: 0.4 is stored as 0, so that y lacks 0.4 E[x_1] = 0.4 * 2
    model = program([gemm("x", "w", "b", "y")], {"w": [[127.0, 0.4]], "b": [1.0]}, ["batch", 2], ["batch", 1])
    data = [{"x": np.array([[0, 1], [0, 3]], np.float32)}]
    ranges = dict.fromkeys(compute_ranges(observe_activations(model, data), "minmax"), (0.0, 255.0))
    result, count = correct_biases(model, model, ranges, data, PtqTask(find_layers(model), PLAIN))
    assert count == 1
    np.testing.assert_allclose(weight(result, "b"), [1.0 + 0.8], rtol=1e-6)
    np.testing.assert_array_equal(weight(result, "w"), weight(model, "w"))


def test_a_layer_without_a_bias_gets_one():
    nodes = [gemm("x", "w", "", "h"), relu("h", "y")]
    model = program(nodes, {"w": [[127.0, 0.4]]}, ["batch", 2], ["batch", 1])
    data = [{"x": np.array([[0, 1], [0, 3]], np.float32)}]
    ranges = dict.fromkeys(("x", "h", "y"), (0.0, 255.0))
    result, _ = correct_biases(model, model, ranges, data, PtqTask(find_layers(model), PLAIN))
    np.testing.assert_allclose(weight(result, "make_h_bias"), [0.8], rtol=1e-6)
    np.testing.assert_allclose(run(result, data[0]["x"]), [[0.4 + 0.8], [1.2 + 0.8]], rtol=1e-6)


def test_a_later_layer_is_corrected_after_those_before_it():
    # the first layer's mean error is gone once it is corrected, so that the second has none of it to take back
    model = two_layers([[127.0, 0.4]], [0.0], [[127.0]], [0.0])
    data = [{"x": np.array([[0, 2], [0, 2]], np.float32)}]
    ranges = {"x": (0.0, 255.0), "h": (0.0, 25.5), "a": (0.0, 25.5), "y": (0.0, 25500.0)}
    result, _ = correct_biases(model, model, ranges, data, PtqTask(find_layers(model), PLAIN))
    np.testing.assert_allclose(weight(result, "b1"), [0.8], rtol=1e-6)
    np.testing.assert_allclose(weight(result, "b2"), [0.0], atol=1e-4)


def test_learned_integers_are_what_the_writer_stores():
    rng = np.random.default_rng(0)
    model = two_layers(rng.standard_normal((6, 8)), np.zeros(6), rng.standard_normal((3, 6)), np.zeros(3))
    mixed = rng.standard_normal((3, 8))
    data = [{"x": (rng.standard_normal((64, 3)) @ mixed).astype(np.float32)} for _ in range(2)]
    ranges = compute_ranges(observe_activations(model, data), "minmax")
    params = PLAIN.model_copy(update={"bias_correction": True})
    found = apply_adaround(model, model, ranges, data[:1], data[1:], PtqTask(find_layers(model), params))
    before, after = (stored_weights(write_qdq(m, find_layers(m), ranges, params)) for m in (model, found.model))
    assert "make_h" in found.changed
    assert found.unsupported == []
    for name in before:
        np.testing.assert_allclose(after[name].scales, before[name].scales, rtol=1e-6)
        moved = np.abs(after[name].integers.astype(int) - before[name].integers).max()
        assert moved == (name in found.changed)
        tensor = {"make_h": "w1", "make_y": "w2"}[name]
        np.testing.assert_allclose(after[name].values, weight(found.model, tensor), rtol=1e-5, atol=1e-7)


def separable() -> onnx.ModelProto:
    """Depthwise-separable convolutions whose channels are spread by an equivalent rescale, their mean, a Linear."""
    rng = np.random.default_rng(0)
    shapes = {"a": (12, 1, 3, 3), "b": (12, 1, 3, 3), "c": (16, 12, 1, 1), "d": (16, 1, 3, 3), "e": (16, 16, 1, 1)}
    weights = {name: 2 * rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    weights["head"] = rng.uniform(-1, 1, (5, 16)) / 4
    nodes, x = [], "x"
    for name, reader in itertools.pairwise(list(weights)):
        outputs, _, size, _ = shapes[name]
        spread = 30 ** rng.uniform(-1, 1, outputs)
        weights[name] = weights[name] * spread.reshape(-1, 1, 1, 1)
        depthwise = shapes.get(reader, (0, 0))[1] == 1
        rest = (1,) * (weights[reader].ndim - 2)
        weights[reader] = weights[reader] / spread.reshape(*((-1, 1) if depthwise else (1, -1)), *rest)
        weights[f"{name}_bias"] = rng.uniform(-0.2, 0.2, outputs) * spread
        groups = outputs if name in "bd" else 1
        conv = ["Conv", [x, name, f"{name}_bias"], [f"{name}_conv"]]
        nodes.append(helper.make_node(*conv, pads=[size // 2] * 4, group=groups))
        nodes.append(relu(f"{name}_conv", x := f"{name}_relu"))
        if reader == "head":
            break
    weights["head_bias"] = rng.uniform(-0.2, 0.2, 5)
    nodes.append(helper.make_node("ReduceMean", [x], ["mean"], axes=[2, 3], keepdims=0))
    nodes.append(gemm("mean", "head", "head_bias", "y"))
    return program(nodes, weights, ["batch", 1, 8, 8], ["batch", 5])


def test_balanced_and_best_keep_on_unseen_data_what_plain_ranges_lose():
    model = separable()
    data, unseen = batches(0, 16, 1, 8, 8), batches(1, 64, 1, 8, 8)
    want = outputs(model, unseen)
    levels, notes, ops = {}, {}, {}
    for effort in ("fast", "balanced", "best"):
        params = apply_preset(Static(algorithm="onnxruntime"), effort)
        quantized, notes[effort] = pipeline.quantize(model, data, PtqTask(find_layers(model), params))
        levels[effort] = sqnr_db(want, outputs(quantized, unseen))
        ops[effort] = Counter(node.op_type for node in quantized.graph.node)
    assert levels["balanced"] > levels["fast"] + 10
    assert levels["best"] > levels["balanced"] - 0.5  # inputs are independent here: nearest is about best
    assert ops["fast"] == ops["balanced"] == ops["best"]  # what it costs to run is the same
    assert notes["fast"] == []
    assert any("Cross-layer equalization on 5 layer groups raised SQNR" in note for note in notes["balanced"])


def test_learned_rounding_lowers_the_noise_on_data_it_never_saw_where_inputs_move_together():
    rng = np.random.default_rng(0)
    model = two_layers(rng.standard_normal((24, 32)), np.zeros(24), rng.standard_normal((8, 24)), np.zeros(8))
    mixed = rng.standard_normal((4, 32))
    data, unseen = (
        [{"x": (rng.standard_normal((64, 4)) @ mixed).astype(np.float32)} for _ in range(8)] for _ in range(2)
    )
    want, levels = outputs(model, unseen), {}
    for rounding in ("nearest", "adaround"):
        params = apply_preset(Static(algorithm="onnxruntime", range_method="minmax", rounding=rounding), "balanced")
        quantized, notes = pipeline.quantize(model, data, PtqTask(find_layers(model), params))
        levels[rounding] = sqnr_db(want, outputs(quantized, unseen))
    assert levels["adaround"] > levels["nearest"] + 0.1
    assert any("AdaRound on 2 layers raised SQNR" in note for note in notes)


def edges() -> onnx.ModelProto:
    """Depthwise 3x3 kernels whose taps nearly cancel out: a smooth image gives small differences of large products."""
    rng = np.random.default_rng(0)
    taps = rng.uniform(-1, 1, (8, 1, 3, 3))
    taps -= taps.mean(axis=(2, 3), keepdims=True)
    mix = rng.uniform(-1, 1, (80, 8, 1, 1))
    nodes = [
        helper.make_node("Conv", ["x", "taps"], ["h"], "depthwise", group=8, pads=[1] * 4),
        helper.make_node("Conv", ["h", "mix"], ["y"], "pointwise"),
    ]
    return program(nodes, {"taps": taps, "mix": mix}, ["batch", 8, 6, 6], ["batch", 80, 6, 6])


def smooth(seed: int, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shape = (16, 8, 6, 6)
    return [
        {"x": (rng.uniform(0, 6, (16, 8, 1, 1)) + 0.05 * rng.standard_normal(shape)).astype(np.float32)}
        for _ in range(count)
    ]


def test_small_kernels_are_rounded_for_inputs_that_move_together_within_the_same_integers():
    model, data, unseen = edges(), smooth(0), smooth(1)
    ranges = compute_ranges(observe_activations(model, data), "minmax")
    found = round_small_kernels(model, ranges, data, PtqTask(find_layers(model), PLAIN))
    assert found.changed == ["depthwise", "pointwise"]
    before, after = (stored_weights(write_qdq(one, find_layers(one), ranges, PLAIN)) for one in (model, found.model))
    for name, tensor in (("depthwise", "taps"), ("pointwise", "mix")):
        np.testing.assert_allclose(after[name].scales, before[name].scales, rtol=1e-6)
        np.testing.assert_allclose(after[name].values, weight(found.model, tensor), rtol=1e-5, atol=1e-7)
        assert np.abs(after[name].integers.astype(int) - before[name].integers).max() == 1
    want = outputs(model, unseen)
    nearest = onnx.ModelProto()
    nearest.CopyFrom(model)
    for tensor in nearest.graph.initializer:
        values = before["depthwise" if tensor.name == "taps" else "pointwise"].values
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    assert sqnr_db(want, outputs(found.model, unseen)) > sqnr_db(want, outputs(nearest, unseen)) + 6


def test_balanced_rounds_small_kernels_where_the_held_out_samples_gain():
    model, data, unseen = edges(), smooth(0), smooth(1)
    want, levels = outputs(model, unseen), {}
    for rounding in ("nearest", "auto"):
        params = apply_preset(Static(algorithm="onnxruntime", range_method="minmax", rounding=rounding), "balanced")
        quantized, notes = pipeline.quantize(model, data, PtqTask(find_layers(model), params))
        levels[rounding] = sqnr_db(want, outputs(quantized, unseen))
    assert "Small kernels of 2 layers were rounded to minimize the output error." in notes
    assert levels["auto"] > levels["nearest"] + 0.3  # activations are rounded in both


def test_steps_that_were_switched_off_are_not_done():
    rng = np.random.default_rng(0)
    model = two_layers(rng.standard_normal((6, 8)), np.zeros(6), rng.standard_normal((3, 6)), np.zeros(3))
    params = Static(range_method="mse", equalize=False, bias_correction=True, rounding="nearest")
    _, notes = pipeline.quantize(model, batches(0, 8, 8), PtqTask(find_layers(model), params))
    assert len(notes) == 1
    assert notes[0].startswith("Bias correction")


def test_one_calibration_sample_is_enough_and_the_note_says_that_it_also_chose():
    rng = np.random.default_rng(0)
    model = two_layers(rng.standard_normal((6, 8)), np.zeros(6), rng.standard_normal((3, 6)), np.zeros(3))
    params = apply_preset(Static(algorithm="onnxruntime"), "best")
    quantized, notes = pipeline.quantize(model, batches(0, 1, 8, count=1), PtqTask(find_layers(model), params))
    assert "same 1 sample" in notes[0]
    assert np.isfinite(run(quantized, batches(1, 4, 8)[0]["x"])).all()


def test_a_network_that_is_not_finite_on_the_calibration_data_is_an_error():
    model = two_layers([[3e38, 3e38], [0, 1]], [0, 0], [[1, 1]], [0])
    params = apply_preset(Static(algorithm="onnxruntime"), "balanced")
    with pytest.raises(DataError, match="not finite"):
        pipeline.quantize(model, [{"x": np.full((4, 2), 2, np.float32)}], PtqTask(find_layers(model), params))


@pytest.mark.parametrize("sizes", [[8], [3, 3, 2], [1, 1], [1, 1, 1, 1, 1], [2]])
def test_a_split_gives_every_sample_to_one_part(sizes):
    numbers = iter(range(100))
    data = [{"x": np.array([[next(numbers)] for _ in range(size)])} for size in sizes]
    fit, held = split(data)
    seen = np.concatenate([batch["x"] for batch in (*fit, *held)]).ravel()
    assert sorted(seen) == list(range(sum(sizes)))
    assert sum(map(size_of, held)) == max(1, sum(sizes) // 4)


def test_a_single_sample_and_a_program_of_a_fixed_batch_are_not_cut():
    one = [{"x": np.zeros((1, 2))}]
    assert split(one) == (one, one)
    fixed = [{"x": np.full((4, 2), number)} for number in range(5)]
    fit, held = split(fixed, sliceable=False)
    assert [batch["x"][0, 0] for batch in held] == [3]
    assert len(fit) == 4


def test_the_noise_of_outputs_is_in_decibels():
    want, got = [{"y": np.array([3.0, 4.0])}], [{"y": np.array([3.0, 4.5])}]
    assert sqnr_db(want, got) == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr_db(want, [{"y": np.array([3.0, np.nan])}]) == -np.inf


def noisy_batches(seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((16, 1, 6, 6)).astype(np.float32)} for _ in range(4)]


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_program_with_more_layers_in_float_takes_the_cached_steps(effort, tmp_path):
    model, batches = chain(), noisy_batches(1)
    params = apply_preset(Static(algorithm="onnxruntime", targets=["*"]), effort)
    layers, kept = find_layers(model), []
    whole, notes = pipeline.quantize(model, batches, PtqTask(layers, params, cache=tmp_path), kept)
    ignoring = params.model_copy(update={"ignore": ["first"]})
    less = [layer for layer in layers if layer.node != "first"]
    mixed, again = pipeline.quantize(model, [], PtqTask(less, ignoring, cache=tmp_path), [])  # needs no samples
    assert again == notes
    before, after = stored_weights(whole), stored_weights(mixed)
    assert after.keys() == before.keys() - {"first"}
    for node, one in after.items():
        np.testing.assert_array_equal(one.integers, before[node].integers)
    wanted = outputs(model, noisy_batches(2), 1)
    lost = [sqnr_db(wanted, outputs(one, noisy_batches(2), 1)) for one in (whole, mixed)]
    assert lost[1] > lost[0] + 0.5


def test_steps_for_fewer_layers_or_other_params_are_not_taken(tmp_path):
    model, layers = chain(), find_layers(chain())
    ignoring = PLAIN.model_copy(update={"ignore": ["third"]})
    pipeline.quantize(model, noisy_batches(1), PtqTask(layers[:2], ignoring, cache=tmp_path))
    whole, _ = pipeline.quantize(model, noisy_batches(1), PtqTask(layers, PLAIN, cache=tmp_path))
    assert "third" in stored_weights(whole)
    symmetric = PLAIN.model_copy(update={"symmetric": True})
    plain, cached = (
        pipeline.quantize(model, noisy_batches(1), PtqTask(layers, symmetric, cache=folder))[0]
        for folder in (None, tmp_path)
    )
    assert cached == plain


def test_a_layer_in_mixed_precision_quantized_ones_stays_in_float_in_onnxruntime(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"first": (32, 1, 3, 3), "second": (32, 32, 1, 1), "third": (8, 32, 1, 1)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    weights["second"] *= np.logspace(-3, 0, 32)[:, None, None, None]  # one scale for all channels would ruin the small
    weights["third"] /= np.logspace(-3, 0, 32)[None, :, None, None]
    places = (("x", "first", "a"), ("a", "second", "b"), ("b", "third", "y"))
    nodes = [helper.make_node("Conv", [x, name], [y], name) for x, name, y in places]
    model = program(nodes, weights, ["batch", 1, 6, 6], ["batch", 8, 4, 4])
    less = [layer for layer in find_layers(model) if layer.node != "second"]
    mixed, _ = pipeline.quantize(model, noisy_batches(1), PtqTask(less, PLAIN))
    assert is_mixed_precision(mixed)
    assert not is_mixed_precision(pipeline.quantize(model, noisy_batches(1), PtqTask(find_layers(model), PLAIN))[0])
    onnx.save(mixed, tmp_path / "mixed.onnx")
    signature = Signature((InputTensor("x", "float32", ("batch", 1, 6, 6), False),), "tensor")
    settings = SessionSettings(1, mixed_precision=True)
    session = ENGINES["onnxruntime"].open(tmp_path / "mixed.onnx", signature, settings)
    x = noisy_batches(2)[0]
    as_written = open_program(mixed, 1, "ORT_ENABLE_BASIC").run(None, x)
    got = session.to_numpy(session.call(session.prepare(x)))
    assert sqnr_db([as_written], [got]) > 40  # 5 dB where the second is rounded as well
