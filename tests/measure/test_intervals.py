from __future__ import annotations

import math

import numpy as np
import pytest

from omgoptim.errors import DataError
from omgoptim.measure.quality import UNKNOWN, Z_975, paired_interval, resampled_interval


def mean_drop(before, after, targets):
    return float(np.mean(np.concatenate([b[0] - a[0] for b, a in zip(before, after, strict=True)])))


def batches(values, *cuts):
    return [[part] for part in np.split(np.asarray(values, float), cuts)]


def test_scores_between_0_and_1_have_the_normal_interval_of_a_paired_mean():
    before, after = np.array([0.9, 0.8, 0.7, 0.95]), np.array([0.8, 0.8, 0.75, 0.85])
    difference = before - after
    half = Z_975 * difference.std(ddof=1) / 2
    assert paired_interval(before, after) == pytest.approx((difference.mean() - half, difference.mean() + half))


def test_no_difference_at_all_still_has_a_width_where_scores_are_hits():
    low, high = paired_interval(np.ones(50), np.ones(50))
    assert low == pytest.approx(-high)
    assert high == pytest.approx(Z_975 * math.sqrt(2 / 52 / 52))


def test_the_same_samples_are_drawn_for_both_sides():
    """The drop is 0.25 on every sample: were the sides drawn apart, it would vary."""
    values = np.random.default_rng(0).normal(size=60) * 100
    low, high = resampled_interval(
        mean_drop, batches(values, 7, 40), batches(values - 0.25, 7, 40), [None] * 3, seed=0, resamples=100
    )
    assert (low, high) == pytest.approx((0.25, 0.25))


def test_the_bootstrap_of_a_mean_has_the_width_of_its_normal_interval():
    random = np.random.default_rng(1)
    before, after = random.normal(size=400), random.normal(size=400)
    low, high = resampled_interval(mean_drop, batches(before, 100), batches(after, 100), [None] * 2, 0, 200)
    expected = paired_interval(before, after)
    assert (high - low) == pytest.approx(expected[1] - expected[0], rel=0.2)
    assert (high + low) / 2 == pytest.approx((before - after).mean(), abs=0.03)


def test_targets_go_with_their_samples_and_every_batch_is_drawn_from():
    seen = []

    def check(before, after, targets):
        for batch, target in zip(before, targets, strict=True):
            assert (batch[0] == target).all()
            seen.extend(target)
        return 0.0

    values = np.arange(12)
    resampled_interval(check, batches(values, 3, 4), batches(values, 3, 4), np.split(values, [3, 4]), 0, 40)
    assert set(seen) == set(range(12))


def test_the_seed_decides_the_draws():
    values = np.random.default_rng(0).normal(size=30)
    draws = [
        resampled_interval(mean_drop, batches(values), batches(values * 2), [None], seed, 50) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_an_output_whose_first_dimension_is_not_the_batch_stays_whole():
    """An LSTM returns its states beside its output: (layers, N, H)."""
    states = np.zeros((1, 5, 2))
    shapes = set()

    def drop(before, after, targets):
        shapes.update((before[0][0].shape, before[0][1].shape))
        return float(before[0][0].sum())

    sides = [[[np.eye(5, 3), states]] for _ in range(2)]
    assert resampled_interval(drop, *sides, [None], 0, 40) != UNKNOWN
    assert shapes == {(5, 3), (1, 5, 2)}


@pytest.mark.parametrize("target", [{"boxes": [1, 2]}, [1, 2, 3], np.array(3)])
def test_a_target_that_is_no_array_of_samples_gives_no_interval(target):
    given = batches(np.arange(3))
    assert resampled_interval(mean_drop, given, given, [target], 0, 50) == UNKNOWN


def failing_every(n):
    calls = [0]

    def drop(before, after, targets):
        calls[0] += 1
        if calls[0] % n == 0:
            raise DataError("only one class was drawn")
        return float(calls[0])

    return drop


def test_a_few_resamples_on_which_the_metric_fails_are_left_out():
    given = batches(np.arange(3))
    low, high = resampled_interval(failing_every(20), given, given, [None], 0, 200)
    assert 1 <= low < high < 200


def test_a_metric_that_fails_on_many_resamples_has_no_interval():
    given = batches(np.arange(3))
    assert resampled_interval(failing_every(5), given, given, [None], 0, 200) == UNKNOWN


def test_a_metric_that_no_resample_changes_has_no_interval():
    """It is 1 whatever is drawn, before and after: an interval from 0 to 0 would claim to be certain."""
    side = [[np.arange(20.0)]]
    assert resampled_interval(lambda before, after, targets: 1.0 - 1.0, side, side, [None], 0, 200) == UNKNOWN
