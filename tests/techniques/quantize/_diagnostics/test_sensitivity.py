"""The simulated noise of layers: against hand-made quantization, and that it points at the layer that was spoilt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from omgoptim.errors import TechniqueError
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._diagnostics.sensitivity import measure_sensitivity
from omgoptim.techniques.quantize._diagnostics.simulation import (
    NON_FINITE_DB,
    Simulation,
    SimulationConfig,
    build_simulation,
    rounded_weight,
)
from omgoptim.techniques.quantize._onnx.qdq import quantization_parameters
from omgoptim.techniques.quantize._ptq.state import MAX_SQNR_DB, sqnr_db

Array = NDArray[np.float32]
FULL = SimulationConfig(weight_levels=127, outputs=False)


def simulated(
    source: Path,
    batches: list[dict[str, Array]],
    rounding: SimulationConfig = FULL,
    samples: int = 48,
    **params: object,
) -> Simulation:
    return build_simulation(source, batches, Static(equalize=False, **params), samples=samples, rounding=rounding)


def program(path: Path, weights: dict[str, Array], batch: str | int = "batch") -> Path:
    """Linear layers one after the other, a ReLU between them: y = relu(x @ a) @ b …"""
    nodes, given = [], "x"
    for index, name in enumerate(weights):
        last = index == len(weights) - 1
        product = "y" if last else f"{name}.out"
        nodes.append(helper.make_node("MatMul", [given, f"{name}.weight"], [product], name=f"node_{name}"))
        if not last:
            given = f"{name}.relu"
            nodes.append(helper.make_node("Relu", [product], [given], name=f"{name}.act"))
    first, *_, final = [*weights.values()] * 2
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, first.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, final.shape[1]])],
        [numpy_helper.from_array(weight, f"{name}.weight") for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def draw() -> Callable[..., Array]:
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape).astype(np.float32)


def test_the_sqnr_is_that_of_signal_over_noise_averaged_over_outputs() -> None:
    signal = [np.array([[3.0, 4.0]], np.float32)]
    noisy = [np.array([[3.0, 4.5]], np.float32)]
    assert sqnr_db([signal], [noisy]) == pytest.approx(20.0)  # 25 over 0.25
    assert sqnr_db([signal * 2], [signal + noisy]) == pytest.approx(20 + 10 * np.log10(2))
    assert sqnr_db([signal], [signal]) == MAX_SQNR_DB


def test_masked_outputs_do_not_count_and_lost_ones_count_as_noise() -> None:
    masked = [np.array([[1.0, -np.inf]], np.float32)]
    assert sqnr_db([masked], [[np.array([[1.1, -np.inf]], np.float32)]]) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db([masked], [[np.array([[np.nan, 0.0]], np.float32)]], NON_FINITE_DB) == pytest.approx(0.0)


def test_grids_and_weights_are_rounded_as_by_hand() -> None:
    scale, zero = quantization_parameters((-1.0, 4.1), symmetric=False)
    assert scale == pytest.approx(0.02)
    assert zero == 50
    assert quantization_parameters((0.5, 5.1), symmetric=False) == (pytest.approx(0.02), 0)
    assert quantization_parameters((-2.54, 1.0), symmetric=True) == (pytest.approx(0.02), 0)
    weight = np.array([[1.27, 0.014], [12.7, 0.26]], np.float32)
    per_row = rounded_weight(weight, 0, FULL)
    assert per_row == pytest.approx(np.array([[1.27, 0.01], [12.7, 0.3]]), abs=1e-6)
    whole = rounded_weight(weight, 0, SimulationConfig(per_channel=False))
    assert whole == pytest.approx(np.array([[1.3, 0.0], [12.7, 0.3]]), abs=1e-6)


def test_one_layer_quantized_gives_what_numpy_gives_by_hand(tmp_path: Path, draw: Callable[..., Array]) -> None:
    weight, x = draw(6, 4), draw(16, 6)
    simulation = simulated(program(tmp_path / "net.onnx", {"a": weight}), [{"x": x}])
    scale, zero = quantization_parameters((float(x.min()), float(x.max())), symmetric=False)
    integers = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)
    by_hand = ((integers - zero) * np.float32(scale)) @ rounded_weight(weight, 1, FULL)
    given = np.concatenate([simulation.outputs({"node_a"}, batch)[0] for batch in simulation.batches])
    assert given == pytest.approx(by_hand, abs=1e-5)
    assert simulation.sqnr({"node_a"}) == pytest.approx(sqnr_db([[x @ weight]], [[by_hand]]), abs=0.01)
    assert simulation.sqnr(()) == MAX_SQNR_DB


def test_the_layer_that_was_spoilt_comes_first_and_restoring_it_brings_most(
    tmp_path: Path, draw: Callable[..., Array]
) -> None:
    weights = {name: draw(16, 16) for name in ("a", "b", "c")} | {"d": draw(16, 5)}
    spread = np.geomspace(0.001, 1, 16).astype(np.float32)
    weights["b"], weights["c"] = weights["b"] * spread, weights["c"] / spread[:, None]  # the same function
    source = program(tmp_path / "net.onnx", weights)
    noise = measure_sensitivity(simulated(source, [{"x": draw(48, 16)}]), restored=True)
    assert noise.samples == 48
    assert noise.estimated == 0
    assert noise.layers[0].layer.path == "c"
    assert noise.layers[0].only_layer_db < noise.layers[1].only_layer_db - 10
    gains = {entry.layer.path: (entry.restored_db or 0) - noise.all_quantized_db for entry in noise.layers}
    assert max(gains, key=lambda path: gains[path]) == "c"
    assert gains["c"] > 10


def test_noise_of_layers_adds_up_about_linearly(tmp_path: Path, draw: Callable[..., Array]) -> None:
    weights = {name: draw(16, 16) for name in ("a", "b", "c")} | {"d": draw(16, 5)}
    noise = measure_sensitivity(simulated(program(tmp_path / "net.onnx", weights), [{"x": draw(48, 16)}]))
    whole = 10 ** (-noise.all_quantized_db / 10)
    assert sum(entry.power for entry in noise.layers) == pytest.approx(whole, rel=0.5)


def test_past_the_time_layers_are_estimated_from_their_own_rounding(tmp_path: Path, draw: Callable[..., Array]) -> None:
    weights = {name: draw(8, 8) for name in ("a", "b", "c")}
    ticks = iter(range(100))
    simulation = simulated(program(tmp_path / "net.onnx", weights), [{"x": draw(8, 8)}])
    noise = measure_sensitivity(simulation, restored=True, limit_s=1.5, clock=lambda: float(next(ticks)))
    assert noise.estimated == 1
    assert len(noise.layers) == 3
    (estimated,) = [entry for entry in noise.layers if not entry.measured]
    assert 0 < estimated.only_layer_db < MAX_SQNR_DB


def test_targets_ignore_and_a_fixed_batch_are_respected(tmp_path: Path, draw: Callable[..., Array]) -> None:
    weights = {name: draw(8, 8) for name in ("a", "b", "c")}
    source = program(tmp_path / "net.onnx", weights, batch=4)
    batches = [{"x": draw(4, 8)} for _ in range(20)]
    simulation = simulated(source, batches, ignore=["b"], samples=10)
    assert [item.layer.path for item in simulation.layers] == ["a", "c"]
    assert simulation.samples == 12  # three whole batches
    with pytest.raises(TechniqueError, match="matches no layer"):
        simulated(source, batches, targets=["nothing"])


def test_a_depthwise_convolution_and_a_transposed_one_are_rounded_per_output_channel(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    spread = np.array([1, 10, 100, 1000], np.float32)[:, None, None, None]
    depthwise = random.standard_normal((4, 1, 3, 3)).astype(np.float32) * spread
    transposed = random.standard_normal((4, 3, 2, 2)).astype(np.float32) / spread  # every channel counts as much
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "d.weight"], ["h"], name="node_d", group=4),
            helper.make_node("ConvTranspose", ["h", "t.weight"], ["y"], name="node_t"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 7, 7])],
        [
            numpy_helper.from_array(depthwise, "d.weight"),
            numpy_helper.from_array(transposed, "t.weight"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "n.onnx")
    batches = [{"x": random.standard_normal((8, 4, 8, 8)).astype(np.float32)}]
    simulation = simulated(tmp_path / "n.onnx", batches)
    axes = {item.layer.path: (item.axis, item.is_depthwise) for item in simulation.layers}
    assert axes == {"d": (0, True), "t": (1, False)}
    assert simulation.sqnr({"node_d"}) > 30
    assert (
        simulated(tmp_path / "n.onnx", batches, SimulationConfig(per_channel=False, outputs=False)).sqnr({"node_d"})
        < 15
    )


def test_scaling_channels_is_simulated_where_the_technique_does_it(tmp_path: Path, draw: Callable[..., Array]) -> None:
    spread = np.geomspace(0.001, 1, 16).astype(np.float32)
    weights = {"a": draw(16, 16) * spread, "b": draw(16, 16) / spread[:, None], "c": draw(16, 5)}
    source, batches = program(tmp_path / "net.onnx", weights), [{"x": draw(48, 16)}]
    plain = simulated(source, batches)
    scaled = build_simulation(source, batches, Static(equalize=True), rounding=FULL)
    assert plain.sqnr(plain.nodes) < 15
    assert scaled.sqnr(scaled.nodes) > 30
    assert scaled.outputs((), scaled.batches[0])[0] == pytest.approx(
        plain.outputs((), plain.batches[0])[0], rel=1e-3, abs=1e-3
    )


def test_a_writer_that_rounds_what_a_layer_gives_spoils_it_for_both_neighbours(
    tmp_path: Path, draw: Callable[..., Array]
) -> None:
    spread = np.geomspace(0.001, 1, 16).astype(np.float32)
    weights = {"a": draw(16, 16) * spread, "b": draw(16, 16) / spread[:, None], "c": draw(16, 5)}
    source, batches = program(tmp_path / "net.onnx", weights), [{"x": draw(48, 16)}]
    inputs_only, both = simulated(source, batches), simulated(source, batches, SimulationConfig(outputs=True))
    assert inputs_only.sqnr({"node_a"}) > 30
    assert both.sqnr({"node_a"}) < 15
    assert both.sqnr(both.nodes - {"node_b"}) < 15  # the tensor between them stays rounded
    assert both.sqnr({"node_c"}) > 30
    assert both.sqnr(()) == MAX_SQNR_DB
