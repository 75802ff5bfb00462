from __future__ import annotations

import numpy as np
import pytest
import torch
from float_programs import program, run, two_layers, weight
from onnx import helper
from torch import nn

from omgoptim.models.onnx_graph import find_layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.layer_weights import find_layer_weights
from omgoptim.techniques.quantize._ptq.equalization import column_factors, equalize_channels, weight_factors
from omgoptim.techniques.quantize._ptq.equalization_groups import find_groups

PER_CHANNEL, PER_TENSOR = Static(granularity="per_channel"), Static(granularity="per_tensor")


def scaled(model, params, x, share=1.0):
    return equalize_channels(model, find_layers(model), params, share, batches=[{"x": x.astype(np.float32)}])


def found_groups(model):
    return find_groups(model, find_layer_weights(model, find_layers(model)))


def test_per_tensor_factors_are_the_square_root_of_written_over_read():
    model = two_layers([[8, 0], [0, 2]], [8, 2], [[1, 2], [2, 1]], [0, 0])
    (group,) = found_groups(model)
    np.testing.assert_allclose(weight_factors(group), [np.sqrt(8 / 2), np.sqrt(2 / 2)])
    result, count = scaled(model, PER_TENSOR, np.eye(2))
    assert count == 1
    # only ratios count: 2 and 1, so channel 0 is divided by twice what channel 1 is
    ratio = np.abs(weight(model, "w1")).max(1) / np.abs(weight(result, "w1")).max(1)
    np.testing.assert_allclose(ratio[0] / ratio[1], 2, rtol=1e-6)
    np.testing.assert_allclose(weight(result, "b1"), np.array([8, 2]) / ratio, rtol=1e-6)
    np.testing.assert_allclose(weight(result, "w2"), weight(model, "w2") * ratio, rtol=1e-6)


def test_per_channel_factors_even_out_the_activation():
    model = two_layers([[100, 0], [0, 1]], [0, 0], [[0.01, 1], [0.02, -1]], [0, 0])
    result, _ = scaled(model, PER_CHANNEL, np.eye(2))
    np.testing.assert_allclose(run(result, np.array([[1, 1]]), "y"), run(model, np.array([[1, 1]]), "y"), rtol=1e-6)
    activation = weight(result, "w1") @ np.ones(2)
    np.testing.assert_allclose(activation[0], activation[1], rtol=1e-6)


def test_a_share_below_one_leaves_range_where_the_readers_column_is_small():
    model = two_layers([[1, 0], [0, 1]], [0, 0], [[1, 0.25], [1, 0.25]], [0, 0])
    (group,) = found_groups(model)
    np.testing.assert_allclose(column_factors(group, 0.5), [1, 2])  # 0.25 ^ -0.5
    np.testing.assert_allclose(column_factors(group, 1.0), [1, 1])


def test_however_the_channels_are_spread_the_same_program_comes_out():
    rng = np.random.default_rng(0)
    w1, w2, factors = rng.standard_normal((4, 3)), rng.standard_normal((2, 4)), np.array([1e-2, 1, 30, 5])
    x = rng.standard_normal((20, 3))
    plain, _ = scaled(two_layers(w1, np.ones(4), w2, [0, 0]), PER_CHANNEL, x, 0.5)
    spread, _ = scaled(two_layers(w1 * factors[:, None], factors, w2 / factors, [0, 0]), PER_CHANNEL, x, 0.5)
    ratio = weight(spread, "w1") / weight(plain, "w1")
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)  # one factor for the whole tensor is no difference


class Branches(nn.Module):
    """Depthwise, grouped and transposed convolutions, a residual sum, pooling, leaky and parametric ReLU, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.slope = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.last = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.stem(x))
        inner = nn.functional.leaky_relu(self.depthwise(stem), 0.1)
        y = self.slope(stem + self.grouped(inner))
        y = torch.relu(self.up(nn.functional.max_pool2d(y, 2)))
        return self.head(torch.relu(self.last(y)).mean((2, 3)))


def test_the_float_function_of_a_net_with_branches_is_kept(export_onnx):
    torch.manual_seed(0)
    module = Branches().eval()
    with torch.no_grad():
        module.stem.weight.mul_(torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1))
    x = torch.randn(6, 2, 8, 8)
    model = export_onnx(module, x[:2])
    want = module(x).detach().numpy()
    for params in (PER_CHANNEL, PER_TENSOR):
        result, count = scaled(model, params, x.numpy(), 0.5)
        got = run(result, x.numpy(), "output")
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
        # the residual stream (stem, grouped, up), inside the branch, up to last, last to head
        assert count == 4
        names = [f"{layer}.weight" for layer in ("stem", "depthwise", "grouped", "up", "last", "head")]
        assert [name for name in names if np.array_equal(weight(model, name), weight(result, name))] == []


def conv(x: str, w: str, y: str) -> object:
    return helper.make_node("Conv", [x, w], [y], kernel_shape=[1, 1])


def clipped(bound: float):
    nodes = [conv("x", "w1", "h"), helper.make_node("Clip", ["h", "low", "high"], ["a"]), conv("a", "w2", "y")]
    weights = {"w1": np.reshape([8, 1], (2, 1, 1, 1)), "w2": np.reshape([1, 1], (1, 2, 1, 1)), "low": 0, "high": bound}
    return program(nodes, weights, ["batch", 1, 1, 1], ["batch", 1, 1, 1])


def test_a_clip_whose_bound_is_never_near_becomes_a_relu_and_one_that_is_reached_stops_the_scaling():
    x = np.ones((1, 1, 1, 1))
    result, count = scaled(clipped(10.0), PER_CHANNEL, x)
    assert count == 1
    assert [node.op_type for node in result.graph.node] == ["Conv", "Relu", "Conv"]
    np.testing.assert_allclose(run(result, x), run(clipped(10.0), x), rtol=1e-6)
    result, count = scaled(clipped(6.0), PER_CHANNEL, x)
    assert count == 0
    assert result == clipped(6.0)


@pytest.mark.parametrize("op", ["Sigmoid", "Softplus"])
def test_what_does_not_commute_with_a_factor_is_left_alone(op):
    nodes = [conv("x", "w1", "h"), helper.make_node(op, ["h"], ["a"]), conv("a", "w2", "y")]
    weights = {"w1": np.ones((2, 1, 1, 1)), "w2": np.ones((1, 2, 1, 1))}
    assert found_groups(program(nodes, weights, ["batch", 1, 4, 4], ["batch", 1, 4, 4])) == []


def test_a_tensor_that_is_read_by_something_else_too_is_left_alone():
    nodes = [conv("x", "w1", "h"), conv("h", "w2", "a"), helper.make_node("Sigmoid", ["h"], ["b"])]
    nodes.append(helper.make_node("Mul", ["a", "b"], ["y"]))
    weights = {"w1": np.ones((2, 1, 1, 1)), "w2": np.ones((2, 2, 1, 1))}
    assert found_groups(program(nodes, weights, ["batch", 1, 4, 4], ["batch", 2, 4, 4])) == []


def test_a_layer_that_stays_in_float_keeps_its_weights():
    model = two_layers([[8, 0], [0, 2]], [8, 2], [[1, 2], [2, 1]], [0, 0])
    result, count = equalize_channels(
        model, find_layers(model)[:1], PER_CHANNEL, 1.0, batches=[{"x": np.eye(2, dtype=np.float32)}]
    )
    assert count == 0
    assert result == model


def test_matmul_with_its_bias_added_after_it_is_scaled_along_the_last_axis():
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["m"]), helper.make_node("Add", ["m", "b1"], ["h"])]
    nodes += [helper.make_node("Relu", ["h"], ["a"]), helper.make_node("MatMul", ["a", "w2"], ["y"])]
    weights = {"w1": [[50, 0], [0, 1]], "b1": [50, 1], "w2": [[1], [1]]}
    model = program(nodes, weights, ["batch", 3, 2], ["batch", 3, 1])
    x = np.random.default_rng(0).standard_normal((4, 3, 2))
    result, count = scaled(model, PER_CHANNEL, x)
    assert count == 1
    np.testing.assert_allclose(run(result, x), run(model, x), rtol=1e-5)
    np.testing.assert_allclose(weight(result, "b1"), weight(result, "w1").sum(0), rtol=1e-6)  # scaled alike
