"""GPTQ and quantization in groups against exhaustive search and rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from omgoptim.techniques.quantize._ptq.gptq import CHUNK, QuantizedGroups, gptq_quantize, output_error, quantize_groups


def test_a_group_of_two_has_the_scale_and_zero_point_computed_by_hand():
    w_KN = np.array([[-1.0, 0.0], [2.0, 3.0]], np.float32)  # ranges -1 .. 2 and 0 .. 3: both 15 steps of 0.2
    groups = quantize_groups(w_KN, 2, 4, symmetric=False)
    np.testing.assert_allclose(groups.s_GN, [[0.2, 0.2]], rtol=1e-6)
    np.testing.assert_array_equal(groups.z_GN, [[5, 0]])
    np.testing.assert_array_equal(groups.q_KN, [[0, 0], [15, 15]])
    np.testing.assert_allclose(groups.weight(), w_KN, atol=1e-6)


def test_a_symmetric_group_has_the_middle_as_its_zero_point_and_the_scale_fitted_to_its_integers():
    groups = quantize_groups(np.array([[-7.0], [3.5]], np.float32), 2, 4, symmetric=True)
    assert groups.z_GN.tolist() == [[8]]
    assert groups.q_KN.tolist() == [[0], [12]]  # -8 and 4, whose best scale is (8 * 7 + 4 * 3.5) / (8 * 8 + 4 * 4)
    np.testing.assert_allclose(groups.s_GN, [[0.875]], rtol=1e-6)


def test_an_outlier_is_cut_off_where_that_costs_less_than_coarse_steps():
    rng = np.random.default_rng(0)
    w_KN = np.append(rng.uniform(-1, 1, 127), 1.6).astype(np.float32)[:, None]
    groups = quantize_groups(w_KN, 128, 4, symmetric=False)
    plain_s = (w_KN.max() - w_KN.min()) / 15
    plain = np.rint((w_KN - w_KN.min()) / plain_s) * plain_s + w_KN.min()
    assert ((groups.weight() - w_KN) ** 2).sum() < ((plain - w_KN) ** 2).sum()
    assert groups.s_GN[0, 0] < plain_s


def test_errors_of_important_inputs_count_for_more():
    rng = np.random.default_rng(0)
    w_KN = rng.standard_normal((64, 32)).astype(np.float32)
    importance_K = np.where(np.arange(64) < 4, 1000, 1).astype(np.float32)
    plain, weighted = quantize_groups(w_KN, 64, 4, False), quantize_groups(w_KN, 64, 4, False, importance_K)

    def cost(groups: QuantizedGroups) -> float:
        return float((importance_K[:, None] * (groups.weight() - w_KN) ** 2).sum())

    assert cost(weighted) < 0.8 * cost(plain)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_of_a_gaussian_is_further_off_than_the_range_and_the_error_is_that_of_the_bits(num_bits, symmetric):
    w_KN = np.random.default_rng(1).standard_normal((128, 48)).astype(np.float32)
    off = quantize_groups(w_KN, 32, num_bits, symmetric).weight() - w_KN
    assert np.sqrt((off**2).mean()) < {4: 0.1, 8: 0.007}[num_bits]


def test_a_group_of_zeros_stays_zero():
    groups = quantize_groups(np.zeros((32, 3), np.float32), 16, 4, symmetric=False)
    assert not groups.weight().any()
    assert np.isfinite(groups.s_GN).all()


def test_columns_are_worked_on_in_parts_without_changing_the_result():
    w_KN = np.random.default_rng(2).standard_normal((1024, CHUNK // 1024 + 3)).astype(np.float32)
    whole, last = quantize_groups(w_KN, 64, 4, False), quantize_groups(w_KN[:, -3:], 64, 4, False)
    np.testing.assert_array_equal(whole.q_KN[:, -3:], last.q_KN)
    np.testing.assert_array_equal(whole.s_GN[:, -3:], last.s_GN)


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
