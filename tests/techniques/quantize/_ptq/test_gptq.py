from __future__ import annotations

import numpy as np

from omgoptim.techniques.quantize._ptq.gptq import QuantizedGroups, gptq_quantize, output_error, quantize_groups


def correlated(rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((rows, 8)) @ rng.standard_normal((8, width))).astype(np.float32)


def test_the_output_error_is_the_mean_square_of_the_outputs_difference():
    x_LK = np.array([[1, 2], [3, -1], [0, 1]], np.float32)
    w_KN = np.array([[0.4], [0.2]], np.float32)
    groups = QuantizedGroups(
        np.array([[1], [0]], np.uint8), np.full((1, 1), 0.5, np.float32), np.zeros((1, 1), np.uint8)
    )
    off = x_LK @ (np.array([[0.5], [0.0]]) - w_KN)
    np.testing.assert_allclose(output_error(w_KN, groups, x_LK.T @ x_LK), (off**2).sum(), rtol=1e-5)


def test_two_equal_inputs_make_good_each_others_error():
    """Output w0 + w1 = 2.8 with steps of 1: nearest gives 1 + 1 or 2 + 2 for 1.4 each; the best is 1 + 2."""
    x_LK = np.ones((50, 4), np.float32)
    x_LK[:, 2:] = 0  # two inputs that are never used hold the scale at 1
    w_KN = np.array([[1.4], [1.4], [0], [15]], np.float32)
    groups = gptq_quantize(w_KN, x_LK.T @ x_LK, 4, 8, symmetric=False)
    coarse = gptq_quantize(w_KN, x_LK.T @ x_LK, 4, 4, symmetric=False)
    assert abs(groups.weight()[:2].sum() - 2.8) < 0.05
    alone = quantize_groups(w_KN, 4, 4, symmetric=False)
    assert abs(coarse.weight()[:2].sum() - 2.8) < abs(alone.weight()[:2].sum() - 2.8)


def test_correlated_inputs_lose_far_less_on_other_samples_than_with_each_group_rounded_alone():
    x_LK = correlated(600, 64)
    fitted, other = x_LK[:300].T @ x_LK[:300], x_LK[300:].T @ x_LK[300:]
    w_KN = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    together, alone = gptq_quantize(w_KN, fitted, 32, 4, False), quantize_groups(w_KN, 32, 4, False)
    assert together.s_GN.shape == alone.s_GN.shape == (2, 32)
    assert output_error(w_KN, together, other) < 0.2 * output_error(w_KN, alone, other)


def test_an_input_that_is_always_zero_harms_nothing():
    x_LK = correlated(100, 32)
    x_LK[:, 5] = 0
    w_KN = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    groups = gptq_quantize(w_KN, x_LK.T @ x_LK, 16, 4, False)
    assert np.isfinite(groups.weight()).all()
    assert np.abs(groups.weight()[5] - w_KN[5]).max() < 1
