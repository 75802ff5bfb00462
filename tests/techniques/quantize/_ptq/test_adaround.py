from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from float_programs import program
from onnx import helper
from torch.nn import functional as F

from omgoptim.models.onnx_graph import find_layers
from omgoptim.techniques.quantize._onnx.layer_weights import find_layer_weights
from omgoptim.techniques.quantize._ptq import adaround
from omgoptim.techniques.quantize._ptq.patch_moments import PatchMoments, is_readable, patch_count, patches


def moments_of(x_PK: np.ndarray, w_OK: np.ndarray) -> PatchMoments:
    found = PatchMoments.empty(1, *w_OK.shape)
    x_PGK = x_PK[:, None, :].astype(np.float32)
    found.add(x_PGK, (x_PGK[:, 0] @ w_OK.T)[:, None, :].astype(np.float32))
    return found


def output_error(q_OK: np.ndarray, w_OK: np.ndarray, x_PK: np.ndarray) -> float:
    return float(np.square(x_PK @ (q_OK - w_OK).T).mean())


def test_two_inputs_that_move_together_are_not_both_rounded_down():
    w_OK, x_PK = np.array([[0.4, 0.4]]), np.array([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]])
    # y = 0.8 x: nearest gives 0 x, one up and one down 1 x, both up 2 x
    found = moments_of(x_PK, w_OK)
    integers = adaround.round_weights(w_OK[None], found, found, centred=False)
    assert sorted(integers[0, 0]) == [0, 1]


def test_where_inputs_are_independent_nearest_is_best_and_stays():
    w_OK = np.array([[0.4, 1.7], [-2.2, 0.9]])
    x_PK = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    found = moments_of(x_PK, w_OK)
    np.testing.assert_array_equal(adaround.round_weights(w_OK[None], found, found)[0], [[0, 2], [-2, 1]])


def test_learned_rounding_is_within_a_fifth_of_the_best_of_all_roundings():
    rng = np.random.default_rng(0)
    x_PK = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 8)) + 0.5 * rng.standard_normal((400, 8))
    w_OK = rng.uniform(-6, 6, (3, 8))
    found = moments_of(x_PK, w_OK)
    ours = adaround.round_weights(w_OK[None], found, found, centred=False)[0]
    nearest = np.rint(w_OK)
    for row, w_K in enumerate(w_OK):
        every = [np.floor(w_K) + np.array(up) for up in itertools.product((0, 1), repeat=8)]
        best = min(output_error(q_K, w_K, x_PK) for q_K in every)
        assert output_error(ours[row], w_K, x_PK) <= best * 1.2 + 1e-6
        assert output_error(ours[row], w_K, x_PK) <= output_error(nearest[row], w_K, x_PK)
    assert output_error(ours, w_OK, x_PK) < 0.25 * output_error(nearest, w_OK, x_PK)


def test_no_weight_moves_by_more_than_one_step_and_the_largest_stays():
    rng = np.random.default_rng(1)
    w_OK = rng.uniform(-100, 100, (4, 12))
    w_OK[:, 5] = 127
    found = moments_of(rng.standard_normal((300, 4)) @ rng.standard_normal((4, 12)), w_OK)
    integers = adaround.round_weights(w_OK[None], found, found)[0]
    assert np.abs(integers - w_OK).max() < 1
    assert (integers[:, 5] == 127).all()
    assert np.abs(integers).max() <= 127


def test_what_helps_only_the_samples_it_was_learned_from_is_not_kept():
    rng = np.random.default_rng(2)
    w_OK = rng.uniform(-6, 6, (1, 6))
    fit = moments_of(rng.standard_normal((50, 1)) @ np.ones((1, 6)), w_OK)
    held = moments_of(rng.standard_normal((4000, 6)), w_OK)  # independent inputs, for which nearest is best
    np.testing.assert_array_equal(adaround.round_weights(w_OK[None], fit, held, centred=False)[0], np.rint(w_OK))


def test_a_layer_too_costly_to_learn_is_still_flipped(monkeypatch):
    monkeypatch.setattr(adaround, "MAX_LAYER_MACS", 0.0)
    monkeypatch.setattr(adaround, "optimize_rounding", lambda *_: pytest.fail("it was learned"))
    w_OK, x_PK = np.array([[0.4, 0.4]]), np.array([[1.0, 1.0], [-1.0, -1.0]])
    found = moments_of(x_PK, w_OK)
    assert sorted(adaround.round_weights(w_OK[None], found, found)[0, 0]) == [0, 1]


def test_rounding_draws_no_random_number():
    rng = np.random.default_rng(3)
    w_OK = rng.uniform(-6, 6, (4, 9))
    found = moments_of(rng.standard_normal((100, 9)), w_OK)
    state = torch.get_rng_state()
    first = adaround.round_weights(w_OK[None], found, found)
    np.testing.assert_array_equal(first, adaround.round_weights(w_OK[None], found, found))
    assert torch.equal(state, torch.get_rng_state())


CONVOLUTIONS = {
    "plain": ((4, 3, 3, 3), {}, (3, 7, 6)),
    "strided and padded": ((4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 2)}, (3, 7, 6)),
    "dilated": ((4, 3, 3, 3), {"dilation": (2, 1), "padding": (2, 0)}, (3, 9, 6)),
    "grouped": ((4, 2, 3, 3), {"groups": 2}, (4, 7, 6)),
    "depthwise": ((6, 1, 3, 3), {"groups": 3, "padding": (1, 1)}, (3, 7, 6)),
    "of a series": ((4, 3, 5), {"stride": (2,), "padding": (2,)}, (3, 11)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_weights_are_what_torch_convolves(name):
    shape, options, size = CONVOLUTIONS[name]
    torch.manual_seed(0)
    w, x = torch.randn(shape), torch.randn(2, *size)
    convolve = F.conv1d if len(size) == 2 else F.conv2d
    want = convolve(x, w, **options).movedim(1, -1).reshape(-1, shape[0]).numpy()
    pads = [*options.get("padding", [0] * (len(size) - 1))] * 2
    node = helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        kernel_shape=shape[2:],
        pads=pads,
        strides=options.get("stride", [1] * (len(size) - 1)),
        dilations=options.get("dilation", [1] * (len(size) - 1)),
        group=options.get("groups", 1),
    )
    model = program([node], {"w": w.numpy()}, ["batch", *size], ["batch", shape[0], *["s"] * (len(size) - 1)])
    (layer,) = find_layer_weights(model, find_layers(model))
    assert is_readable(layer)
    assert patch_count(layer, x.numpy()) == len(want)
    w_GOK = layer.read().reshape(layer.groups, shape[0] // layer.groups, -1)
    for keep in (None, np.array([5, 0, 7])):
        got = np.einsum("pgk,gok->pgo", patches(layer, x.numpy(), keep), w_GOK)
        expected = want if keep is None else want[keep]
        np.testing.assert_allclose(got.reshape(len(got), -1), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.restore(layer.read()), w.numpy())


def test_moments_of_two_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    w_OK, x_PK = rng.standard_normal((2, 3)), rng.standard_normal((10, 3))
    whole, parts = moments_of(x_PK, w_OK), moments_of(x_PK[:4], w_OK)
    parts.add(x_PK[4:, None].astype(np.float32), (x_PK[4:] @ w_OK.T)[:, None].astype(np.float32))
    for one, other in zip(whole.quadratic(True), parts.quadratic(True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.quadratic(True)[0][0], np.cov(x_PK.T, bias=True), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.shift(np.zeros((1, 2, 3)))[0], (x_PK @ w_OK.T).mean(0), rtol=1e-4)
