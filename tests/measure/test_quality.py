"""Quality of two artifacts on the same samples, with the interval of the drop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from omgoptim.errors import DataError
from omgoptim.measure.builtin_metrics import Metric, agreement_metric, builtin_metric
from omgoptim.measure.quality import (
    MIN_RESAMPLES,
    RESAMPLES,
    UNKNOWN,
    Z_975,
    Quality,
    compare_quality,
    paired_interval,
    read_outputs,
    resampled_interval,
    score,
)


def outputs(*batches):
    """Batches of a model with one output."""
    return [[np.asarray(batch, np.float32)] for batch in batches]


def one_hot(classes, count=3):
    return np.eye(count)[np.asarray(classes)]


def value(name, scores, targets):
    metric = builtin_metric(name, scores, targets)
    assert metric is not None
    return score(metric, scores, targets, scores)


# top1


def test_auto_is_the_accuracy_for_integer_targets():
    scores, targets = outputs(one_hot([0, 1]), one_hot([2, 2])), [np.array([0, 2]), np.array([2, 2])]
    metric = builtin_metric("auto", scores, targets)
    assert metric.name == "top1_accuracy"
    assert score(metric, scores, targets, scores) == 3 / 4


def test_a_target_of_minus_100_does_not_count():
    scores, targets = outputs(one_hot([0, 1, 2, 0])), [np.array([0, -100, 1, -100])]
    metric = builtin_metric("auto", scores, targets)
    assert score(metric, scores, targets, scores) == 1 / 2
    assert compare_quality(metric, scores, scores, targets, 0).samples == 2


def test_targets_that_are_all_ignored_are_an_error_and_no_score():
    with pytest.raises(DataError, match="no target that the metric counts"):
        value("top1", outputs(one_hot([0, 1])), [np.array([-100, -100])])


def test_the_class_dimension_may_be_last_or_second():
    predicted = np.array([[0, 1, 2, 3], [4, 3, 2, 1]])  # (2, 4), of 5 classes
    target = np.array([[0, 1, 2, 0], [4, 0, -100, 0]])
    last = np.eye(5)[predicted]  # (2, 4, 5)
    assert value("top1", outputs(last), [target]) == pytest.approx(4 / 7)
    assert value("top1", outputs(last.transpose(0, 2, 1)), [target]) == pytest.approx(4 / 7)


def test_the_targets_of_one_sample_are_one_unit_of_the_interval():
    """Ten copies of every target say nothing new: the interval is as wide as with one target per sample."""
    random = np.random.default_rng(0)
    target = random.integers(0, 3, 200)
    right, wrong = one_hot(target), one_hot(np.where(random.random(200) < 0.3, (target + 1) % 3, target))
    metric = builtin_metric("top1", outputs(right), [target])
    once = compare_quality(metric, outputs(right), outputs(wrong), [target], 0)
    tenfold = [outputs(np.repeat(scores[:, None], 10, 1)) for scores in (right, wrong)]
    assert compare_quality(metric, *tenfold, [np.repeat(target[:, None], 10, 1)], 0).low == pytest.approx(once.low)


def test_a_sample_with_more_targets_weighs_more():
    """6 hits of 8 targets, 3 hits of 4 in the first sample, 0 of 1 in the second, 3 of 3 in the third."""
    target = np.array([[0, 0, 0, 1], [1, -100, -100, -100], [0, 0, 0, -100]])
    scores = outputs(one_hot(np.zeros((3, 4), int)))
    assert value("top1", scores, [target]) == pytest.approx(6 / 8)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize(("scores", "cut"), [([-3, 2, 0.2, -0.1], "0"), ([0.1, 0.9, 0.6, 0.4], "one half")])
def test_a_single_score_is_a_logit_or_a_probability(scores, cut, shape):
    given = outputs(np.reshape(scores, shape))
    assert value("auto", given, [np.array([0, 1, 1, 0])]) == 1, cut
    assert value("auto", given, [np.array([False, True, False, False])]) == 3 / 4, cut


def test_a_mask_of_one_channel_is_compared_with_a_mask_without_it():
    mask = np.random.default_rng(0).integers(0, 2, (2, 3, 3))
    assert value("top1", outputs(mask[:, None] * 2.0 - 1), [mask]) == 1


def test_targets_that_do_not_fit_say_both_shapes():
    with pytest.raises(DataError) as raised:
        value("top1", outputs(np.zeros((2, 3))), [np.zeros((2, 4), int)])
    assert "(batch, 3)" in raised.value.why
    assert "(2, 4)" in raised.value.why


@pytest.mark.parametrize("target", [np.array(["a", "b"]), np.asarray({"boxes": 1})])
def test_targets_that_are_no_numbers_need_a_metric_of_ones_own(target):
    with pytest.raises(DataError, match="no built-in metric") as raised:
        builtin_metric("auto", outputs(one_hot([0, 1])), [target])
    assert "`metric='file.py:callable'`" in raised.value.fix


# r2


def test_r2_is_that_of_scikit_learn():
    from sklearn.metrics import r2_score

    random = np.random.default_rng(0)
    actual = random.normal(size=(40, 1)).astype(np.float32)
    predicted = actual + random.normal(size=(40, 1)).astype(np.float32)
    found = value("auto", outputs(predicted[:25], predicted[25:]), [actual[:25], actual[25:]])
    assert found == pytest.approx(r2_score(actual, predicted), rel=1e-6)


def test_r2_refuses_targets_of_another_shape():
    with pytest.raises(DataError, match="do not fit"):
        value("r2", outputs(np.zeros((3, 2))), [np.zeros((3, 1))])


@pytest.mark.parametrize("name", ["top1", "r2"])
def test_a_metric_on_targets_needs_targets(name):
    with pytest.raises(DataError, match="needs targets"):
        builtin_metric(name, outputs(one_hot([0])), [None])


def test_a_name_that_is_not_built_in_is_left_to_others():
    assert builtin_metric("Accuracy", outputs(one_hot([0])), [np.array([0])]) is None


# agreement


def test_probabilities_agree_when_their_largest_entry_is_the_same():
    original, other = outputs([[0.7, 0.2, 0.1], [0, 0.6, 0.4]]), outputs([[9, 1, 8], [0, 1, 2]])
    metric = agreement_metric(original)
    assert metric.name == "top1_agreement"
    assert score(metric, other, [None], original) == 0.5


def test_rows_without_a_sign_of_classes_are_values_and_agree_by_one_minus_the_squared_relative_error():
    """Means (2, 3), variances (2, 2) about them with one degree of freedom less; one of four entries is off by 1."""
    original, other = outputs([[1, 2], [3, 4]]), outputs([[1, 2], [3, 5]])
    metric = builtin_metric("auto", original, [None])
    assert metric.name == "r2_agreement"
    assert score(metric, other, [None], original) == pytest.approx(1 - (1 / 4) / 2)
    assert score(metric, original, [None], original) == 1


def test_always_answering_the_mean_keeps_nothing_of_a_single_number():
    values = np.random.default_rng(0).normal(5, 1, (50, 1))
    original = outputs(values[:20], values[20:])
    always = outputs(np.full((20, 1), values.mean()), np.full((30, 1), values.mean()))
    assert score(agreement_metric(original), always, [None], original) == pytest.approx(1 - 49 / 50, abs=1e-6)


def test_sure_probabilities_are_class_scores_although_their_rows_have_unit_length():
    assert agreement_metric(outputs([[1, 0], [0, 1]])).name == "top1_agreement"


def test_the_metric_top1_agreement_marks_rows_as_class_scores():
    original, other = outputs([[3, 1, 0], [0, 2, 1]]), outputs([[9, 1, 8], [0, 1, 2]])
    metric = builtin_metric("top1_agreement", original, [None])
    assert metric.agreement
    assert score(metric, other, [None], original) == 0.5


def test_a_cosine_compares_the_directions_of_vectors_and_never_a_single_number():
    original, other = outputs([[1, 0], [0.6, -0.8]]), outputs([[0, 1], [0.6, -0.8]])
    metric = builtin_metric("cosine", original, [None])
    assert metric.name == "cosine_agreement"
    assert score(metric, other, [None], original) == pytest.approx(0.5)
    with pytest.raises(DataError, match="cosine") as raised:
        builtin_metric("cosine", outputs([[1.0], [2.0]]), [None])
    assert "sign" in raised.value.why
    with pytest.raises(DataError, match="cosine"):
        builtin_metric("cosine", outputs([[1.0, 2.0], [1.0, 2.0]]), [None])  # the same for every sample


def test_the_cosine_of_two_zeros_is_one_and_of_zero_and_something_is_zero():
    original, other = outputs([[[0, 0]], [[1, 1]]]), outputs([[[0, 0]], [[0, 0]]])
    assert score(builtin_metric("cosine", original, [None]), other, [None], original) == 0.5


def test_the_infinite_values_of_a_mask_are_no_difference_and_any_others_are_an_error():
    masked = outputs([[[-np.inf, 1.0, 2.0]], [[-np.inf, 2.0, 4.0]]])
    assert score(agreement_metric(masked), masked, [None], masked) == pytest.approx(1)
    with pytest.raises(DataError, match="is infinite where"):
        score(agreement_metric(masked), outputs([[[-np.inf, np.inf, 2.0]], [[0, 0, 0]]]), [None], masked)


def test_an_output_that_is_a_single_number_cannot_be_compared():
    with pytest.raises(DataError, match="scalar"):
        agreement_metric([[np.float32(1.0).reshape(())]])


# comparing


def test_the_drop_of_an_accuracy_comes_with_bonett_and_prices_interval():
    """20 samples, 5 lost and 1 won: p = 6/22, q = 2/22, half = 1.96 sqrt((p + q - (p - q)^2) / 22)."""
    targets = [np.zeros(20, int)]
    before, after = np.zeros(20, int), np.zeros(20, int)
    before[0], after[1:6] = 1, 1
    given = [outputs(one_hot(predicted)) for predicted in (before, after)]
    quality = compare_quality(builtin_metric("top1", given[0], targets), *given, targets, 0)
    assert (quality.before, quality.after) == (19 / 20, 15 / 20)
    assert quality.drop == pytest.approx(4 / 20)
    assert quality.low == pytest.approx(4 / 22 - 1.959964 * math.sqrt((8 / 22 - (4 / 22) ** 2) / 22), abs=1e-9)
    assert quality.high == pytest.approx(4 / 22 + 1.959964 * math.sqrt((8 / 22 - (4 / 22) ** 2) / 22), abs=1e-9)
    assert quality.agreement == pytest.approx(14 / 20)


def test_a_single_cosine_has_no_interval_and_nothing_crashes_on_it():
    given = outputs([[[1.0, 2.0]]])
    metric = builtin_metric("cosine", given, [None])
    quality = compare_quality(metric, given, outputs([[[1.0, 2.1]]]), [None], 0)
    assert (quality.low, quality.high) == (-math.inf, math.inf)
    assert not quality.decided(0.01)
    assert quality.samples_to_decide(0.01) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_gives_no_finite_number_is_an_error(bad):
    with pytest.raises(DataError, match="metric mine returned"):
        score(Metric("mine", over_all=lambda outputs, targets: bad), outputs([[1]]), [None], outputs([[1]]))


def test_what_the_measuring_process_wrote_is_read_in_order(tmp_path):
    for index in (1, 0):
        np.savez(tmp_path / f"{index:06d}.npz", **{"0": np.full(2, index), "1": np.full((2, 3), index)})
    read = read_outputs(tmp_path)
    assert [[array.shape for array in batch] for batch in read] == [[(2,), (2, 3)], [(2,), (2, 3)]]
    assert [int(batch[0][0]) for batch in read] == [0, 1]


def quality(drop, low, high, samples=100):
    return Quality("top1_accuracy", 0.9, 0.9 - drop, drop, low, high, 0.9, samples)


@pytest.mark.parametrize(
    ("low", "high", "decided"),
    [(-0.01, 0.01, True), (-0.01, 0.02, False), (0.011, 0.03, True), (0.01, 0.03, False)],
)
def test_the_guard_is_decided_when_the_whole_interval_is_on_one_side(low, high, decided):
    assert quality((low + high) / 2, low, high).decided(0.01) is decided


def test_samples_to_decide_grow_with_the_square_of_what_the_width_lacks():
    assert quality(0.0, -0.04, 0.04).samples_to_decide(0.02) == 400  # half the width: four times the samples
    assert quality(0.0, -0.02, 0.04).samples_to_decide(0.02) == 400  # the wider side counts


def test_no_number_of_samples_decides_a_drop_on_the_guard():
    assert quality(0.01, -0.02, 0.04).samples_to_decide(0.01) is None


# metrics of the whole set


class SlowMetric:
    """Counts its calls, and moves a clock of its own by `seconds` at each."""

    def __init__(self, seconds):
        self.seconds, self.calls, self.now = seconds, 0, 0.0

    def __call__(self, given, targets):
        self.calls += 1
        self.now += self.seconds
        return float(np.mean(np.concatenate([batch[0] for batch in given])))

    def compare(self, whole=None, samples=30):
        """Compare on a clock that only the metric moves."""
        before = outputs(np.arange(samples))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("omgoptim.measure.quality.time.perf_counter", lambda: self.now)
            metric = Metric("slow", over_all=whole or self)
            return compare_quality(metric, before, outputs(np.arange(samples) - 1.0), [None], 0)


@pytest.mark.parametrize(("seconds", "resamples"), [(0.001, RESAMPLES), (0.1, 100), (0.25, MIN_RESAMPLES)])
def test_a_metric_is_recomputed_as_often_as_its_own_time_allows(seconds, resamples):
    slow = SlowMetric(seconds)
    found = slow.compare()
    assert slow.calls == 2 + 2 * resamples
    assert math.isfinite(found.low)


def test_a_metric_too_slow_to_be_recomputed_has_no_interval():
    slow = SlowMetric(0.3)
    found = slow.compare()
    assert slow.calls == 2
    assert found.drop == pytest.approx(1)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_a_slow_first_call_does_not_count_for_the_metrics_speed():
    slow = SlowMetric(0.001)
    slow.now = 0.0
    first = slow.__call__

    def whole(given, targets):
        if not slow.calls:
            slow.now += 60  # it imports something
        return first(given, targets)

    assert math.isfinite(slow.compare(whole).low)


def test_a_rare_class_that_is_lost_is_found_behind_an_accuracy_that_hardly_falls():
    labels = np.array([0] * 980 + [1] * 20)
    original = [[np.eye(2, dtype=np.float32)[labels]]]
    collapsed = [[np.eye(2, dtype=np.float32)[np.zeros(1000, int)]]]
    metric = builtin_metric("auto", original, [labels])
    found = compare_quality(metric, original, collapsed, [labels], 0)
    assert found.drop == pytest.approx(0.02)
    assert [(one.label, one.samples, one.before, one.after) for one in found.lost_classes] == [(1, 20, 1.0, 0.0)]
    assert compare_quality(metric, original, original, [labels], 0).lost_classes == ()


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


def test_tokens_that_do_not_differ_have_the_width_of_one_token_and_not_none():
    scores = np.tile([0.0, 0.25, 0.5, 1.0], 12) + 0.5
    low, high = paired_interval(scores, scores)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(0.25 * Z_975 * math.sqrt(2) / 50)


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
