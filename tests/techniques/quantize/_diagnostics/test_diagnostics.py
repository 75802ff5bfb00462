"""Known causes of lost quality: each is planted in a small program and found, and a plain one has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._diagnostics.diagnostics import Diagnostic, diagnose
from omgoptim.techniques.quantize._diagnostics.simulation import build_simulation

Array = NDArray[Any]
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((32, 8, 6, 6)).astype(np.float32)


def found(
    folder: Path,
    nodes: list[NodeProto],
    stored: dict[str, Array],
    *,
    x: Array = IMAGES,
    params: Static | None = None,
    evaluation: Array | None = None,
) -> dict[str, Diagnostic]:
    """The signatures of the program x -> y, by name."""
    params = params or Static(equalize=False)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *x.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "net.onnx")
    simulation = build_simulation(folder / "net.onnx", [{"x": x}], params)
    coming = [] if evaluation is None else [{"x": evaluation}]
    return {signature.name: signature for signature in diagnose(simulation, params, coming)}


def conv(name: str, given: str, out: str, **attributes: int) -> NodeProto:
    return helper.make_node("Conv", [given, f"{name}.weight"], [out], name=f"node_{name}", **attributes)


def weight(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_a_plain_network_has_no_known_cause(tmp_path: Path) -> None:
    nodes = [conv("a", "x", "h"), helper.make_node("Relu", ["h"], ["r"]), conv("b", "r", "y")]
    stored = {"a.weight": weight(8, 8, 1, 1), "b.weight": weight(4, 8, 1, 1)}
    assert found(tmp_path, nodes, stored, evaluation=IMAGES) == {}


def test_outliers_are_reported_with_their_ratio(tmp_path: Path) -> None:
    x = IMAGES.clip(-3, 3)
    x[0, 0, 0, 0] = 90.0
    signature = found(tmp_path, [conv("a", "x", "y")], {"a.weight": weight(4, 8, 1, 1)}, x=x)["activation outliers"]
    assert signature.paths == ["a"]
    assert "reaches 90" in signature.evidence
    assert signature.undo == {"range_method": "percentile"}
    clipped = Static(equalize=False, range_method="mse")
    again = found(tmp_path, [conv("a", "x", "y")], {"a.weight": weight(4, 8, 1, 1)}, x=x, params=clipped)
    assert again["activation outliers"].undo == {}
    assert again["activation outliers"].nodes == ["node_a"]


def test_channels_spread_by_an_equivalent_rescale_are_found_at_the_layer_that_reads_them(tmp_path: Path) -> None:
    factors = np.geomspace(0.01, 1, 8).astype(np.float32)
    nodes = [conv("a", "x", "h"), helper.make_node("Relu", ["h"], ["r"]), conv("b", "r", "y")]
    stored = {
        "a.weight": weight(8, 8, 1, 1) * factors[:, None, None, None],
        "b.weight": weight(4, 8, 1, 1) / factors[None, :, None, None],
    }
    signature = found(tmp_path, nodes, stored)["spread channels"]
    assert signature.paths == ["b"]
    assert signature.undo == {"equalize": True}
    assert "spread channels" not in found(tmp_path, nodes, stored, params=Static(equalize=True))


def test_depthwise_weights_with_one_scale_are_found_and_a_scale_per_channel_cures_them(tmp_path: Path) -> None:
    factors = np.array([1, 1, 1, 1, 1, 1, 1, 100], np.float32)[:, None, None, None]
    nodes, stored = [conv("d", "x", "y", group=8)], {"d.weight": weight(8, 1, 3, 3).clip(-1, 1) * factors}
    signature = found(tmp_path, nodes, stored, params=Static(equalize=False, granularity="per_tensor"))[
        "per-tensor depthwise weights"
    ]
    assert signature.paths == ["d"]
    assert signature.undo == {"granularity": "per_channel"}
    assert found(tmp_path, nodes, stored) == {}


@pytest.mark.parametrize("fill", [-3.4e38, -1e9, -np.inf])
def test_a_masks_fill_is_found(tmp_path: Path, fill: float) -> None:
    nodes = [
        conv("a", "x", "h"),
        helper.make_node("Where", ["mask", "h", "fill"], ["m"], name="masked"),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]
    mask = np.tril(np.ones((6, 6), bool))
    stored = {"a.weight": weight(4, 8, 1, 1), "mask": mask, "fill": np.array(fill, np.float32)}
    assert found(tmp_path, nodes, stored)["mask fill"].paths == ["masked"]


def test_a_norm_that_cannot_be_folded_is_found_and_one_behind_a_convolution_is_gone(tmp_path: Path) -> None:
    norm = {name: np.ones(8, np.float32) for name in ("scale", "bias", "mean", "var")}
    behind = [conv("a", "x", "h"), helper.make_node("BatchNormalization", ["h", *norm], ["y"], name="norm")]
    before = [helper.make_node("BatchNormalization", ["x", *norm], ["h"], name="norm"),
              helper.make_node("Relu", ["h"], ["r"]), conv("a", "r", "y")]  # fmt: skip
    stored = {"a.weight": weight(8, 8, 1, 1)} | norm
    assert "unfolded batch norm" not in found(tmp_path, behind, stored)
    assert found(tmp_path, before, stored)["unfolded batch norm"].paths == ["norm"]


def test_hard_swish_and_squeeze_excite_are_distinguished(tmp_path: Path) -> None:
    swish = [
        conv("a", "x", "h"),
        helper.make_node("HardSigmoid", ["h"], ["g"], alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["h", "g"], ["y"], name="swish"),
    ]
    assert list(found(tmp_path, swish, {"a.weight": weight(8, 8, 1, 1)})) == ["hard-swish"]
    excite = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        conv("squeeze", "p", "s"),
        helper.make_node("Relu", ["s"], ["r"]),
        conv("excite", "r", "e"),
        helper.make_node("Sigmoid", ["e"], ["g"]),
        helper.make_node("Mul", ["x", "g"], ["y"], name="scaled"),
    ]
    stored = {"squeeze.weight": weight(2, 8, 1, 1), "excite.weight": weight(8, 2, 1, 1)}
    signature = found(tmp_path, excite, stored)["squeeze-excite"]
    assert set(signature.nodes) == {"node_squeeze", "node_excite"}
    assert set(signature.paths) == {"squeeze", "excite"}


@pytest.mark.parametrize("factor", [255.0, 1 / 255])
def test_inputs_that_come_scaled_otherwise_than_calibrated_are_found(tmp_path: Path, factor: float) -> None:
    nodes, stored = [conv("a", "x", "y")], {"a.weight": weight(4, 8, 1, 1)}
    signature = found(tmp_path, nodes, stored, evaluation=IMAGES * factor)["calibration unlike evaluation"]
    assert signature.paths == ["x"]
    assert not signature.undo
    assert not signature.nodes
