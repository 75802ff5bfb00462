from __future__ import annotations

import math

import numpy as np
import pytest

from omgoptim.errors import DataError
from omgoptim.measure.agreement import output_agreements, worst_scores
from omgoptim.measure.builtin_metrics import Metric, builtin_metric, detect_outputs
from omgoptim.measure.quality import compare_quality

RANDOM = np.random.default_rng(0)


def batches(*heads):
    """Two batches of a model with several outputs."""
    return [[np.asarray(head[rows], np.float32) for head in heads] for rows in (slice(0, 60), slice(60, None))]


BOXES = RANDOM.normal((3, 7), (1, 2), (100, 2))
SCORES = np.eye(4)[RANDOM.integers(0, 4, 100)]


def test_the_relative_error_is_the_error_over_the_spread_about_the_mean_of_each_entry():
    wrong = BOXES + RANDOM.normal(0, 0.3, BOXES.shape)
    (found,) = output_agreements(detect_outputs(batches(BOXES)), batches(wrong), batches(BOXES))
    by_hand = math.sqrt(((wrong - BOXES) ** 2).mean() / BOXES.var(0, ddof=1).mean())
    assert found.relative_error == pytest.approx(by_hand, rel=1e-5)
    assert found.agreement == pytest.approx(1 - by_hand**2, rel=1e-5)
    assert not found.ruined


def test_every_output_is_compared_as_what_it_is_and_the_worst_judges():
    original = batches(BOXES, SCORES)
    swapped = SCORES[:, ::-1].copy()
    candidate = batches(BOXES, swapped)
    boxes, scores = output_agreements(detect_outputs(original), candidate, original)
    assert (boxes.agreement, boxes.relative_error) == (1, 0)
    assert scores.agreement == (swapped.argmax(1) == SCORES.argmax(1)).mean() == 0
    assert scores.ruined
    assert worst_scores(detect_outputs(original), candidate, original).mean() == 0
    metric = builtin_metric("auto", original, [None, None])
    assert metric.name == "worst_output_agreement"
    assert compare_quality(metric, original, candidate, [None, None], 0).drop == 1


def test_a_mirrored_number_is_ruined_though_its_sign_is_the_same():
    """Positive numbers have cosine 1 whatever they are; r2 of the mirrored ones is below 0."""
    number = RANDOM.uniform(0.2, 0.8, (100, 1))
    original, candidate = batches(number), batches(1 - number)
    (found,) = output_agreements(detect_outputs(original), candidate, original)
    assert found.agreement < 0
    assert found.ruined
    assert found.cosine is None


def test_a_constant_output_is_compared_with_its_own_size():
    constant = np.full((100, 3), 4.0)
    (found,) = output_agreements(detect_outputs(batches(constant)), batches(constant + 1), batches(constant))
    assert found.relative_error == pytest.approx(1 / 4)
    zeros = np.zeros((100, 3))
    (found,) = output_agreements(detect_outputs(batches(zeros)), batches(zeros + 0.25), batches(zeros))
    assert found.relative_error == pytest.approx(0.25)


def test_integers_agree_by_the_fraction_that_is_equal():
    ids = np.arange(200).reshape(100, 2)
    other = ids.copy()
    other[:30, 0] += 1
    original, candidate = [[ids[:60]], [ids[60:]]], [[other[:60]], [other[60:]]]
    (found,) = output_agreements(detect_outputs(original), candidate, original)
    assert found.spec.compared_by == "exact_agreement"
    assert found.agreement == pytest.approx(1 - 30 / 200)


def test_an_output_that_the_metric_never_reads_is_guarded_and_those_it_reads_are_not():
    """A metric that only reads the scores is perfect; the boxes are another sample's."""
    labels = [part.argmax(1) for part in (SCORES[:60], SCORES[60:])]
    original, candidate = batches(BOXES, SCORES), batches(BOXES[::-1], SCORES)
    quality = compare_quality(builtin_metric("auto", original, labels), original, candidate, labels, 0)
    assert quality.drop == 0
    assert [output.spec.name for output in quality.ruined] == ["output_0"]
    agreement = builtin_metric("auto", original, [None, None])
    assert compare_quality(agreement, original, candidate, [None, None], 0).ruined == ()  # its own drop says it


def test_of_a_metric_whose_reading_is_not_known_all_of_several_outputs_are_guarded():
    original, candidate = batches(BOXES, SCORES), batches(BOXES, SCORES[::-1])
    mine = Metric("mine", over_all=lambda outputs, targets: 1.0, outputs=detect_outputs(original))
    assert [o.spec.name for o in compare_quality(mine, original, candidate, [None, None], 0).ruined] == ["output_1"]
    alone = Metric("mine", over_all=lambda outputs, targets: 1.0)
    only = compare_quality(alone, batches(SCORES), batches(SCORES[::-1]), [None, None], 0)
    assert only.ruined == ()
    assert only.agreement < 0.5


def test_an_ignored_output_neither_judges_nor_fails():
    original, candidate = batches(BOXES, SCORES), batches(BOXES[::-1], SCORES)
    outputs = detect_outputs(original, ignored=["0"])
    metric = builtin_metric("auto", original, [None, None], outputs)
    quality = compare_quality(metric, original, candidate, [None, None], 0)
    assert (quality.drop, quality.ruined, metric.name) == (0, (), "top1_agreement")


def test_a_missing_output_is_an_error_with_its_name():
    original = batches(BOXES, SCORES)
    with pytest.raises(DataError, match="'output_1'"):
        output_agreements(detect_outputs(original), batches(BOXES), original)


def test_the_spread_does_not_depend_on_how_samples_come_in_batches():
    wrong = BOXES + 0.1
    one = [[[BOXES.astype(np.float32)]], [[wrong.astype(np.float32)]]]
    (whole,) = output_agreements(detect_outputs(one[0]), one[1], one[0])
    (parts,) = output_agreements(detect_outputs(batches(BOXES)), batches(wrong), batches(BOXES))
    assert whole.relative_error == pytest.approx(parts.relative_error, rel=1e-6)


def test_sequences_of_several_lengths_are_compared_by_their_last_dimension():
    parts = [RANDOM.normal(size=(4, length, 3)).astype(np.float32) for length in (5, 9)]
    wrong = [part + np.float32(0.1) for part in parts]
    rows = np.concatenate([part.reshape(-1, 3) for part in parts])
    original, candidate = [[part] for part in parts], [[part] for part in wrong]
    (found,) = output_agreements(detect_outputs(original), candidate, original)
    assert found.relative_error == pytest.approx(0.1 / math.sqrt(rows.var(0, ddof=1).mean()), rel=1e-4)


def test_a_sample_of_another_size_is_no_answer():
    boxes = [RANDOM.normal(size=(1, count, 4)).astype(np.float32) for count in (3, 2)]
    original, candidate = [[boxes[0]], [boxes[1]]], [[boxes[0]], [boxes[0]]]
    (found,) = output_agreements(detect_outputs(original), candidate, original)
    assert found.agreement == pytest.approx(0.5)


def test_a_state_with_its_batch_second_is_compared_sample_by_sample():
    state = RANDOM.normal(size=(2, 6, 3)).astype(np.float32)
    logits = RANDOM.normal(size=(6, 5)).astype(np.float32)
    original = [[logits, state], [logits[:4], state[:, :4]]]
    candidate = [[logits, -state], [logits[:4], -state[:, :4]]]
    outputs = detect_outputs(original)
    assert outputs.specs[1].batch_axis == 1
    scores = worst_scores(outputs, candidate, original)
    assert scores.shape == (10,)
    assert scores.mean() < 0


def detections(boxes: float, scores: float):
    """100 samples of four boxes in pixels and two scores beside each, with errors of these sizes."""
    random = np.random.default_rng(3)
    truth = np.concatenate([random.normal(300, 100, (100, 4, 4)), random.uniform(0, 1, (100, 2, 4))], 1)
    noise = random.normal(0, 1, truth.shape) * np.array([boxes] * 4 + [scores] * 2)[:, None]
    return batches(truth), batches(truth + noise)


@pytest.mark.parametrize(("boxes", "scores", "ruined"), [(5.0, 0.01, False), (0.0, 1.0, True), (5.0, 0.4, True)])
def test_scores_that_are_lost_beside_boxes_in_pixels_are_ruined_though_the_whole_error_is_small(boxes, scores, ruined):
    original, candidate = detections(boxes, scores)
    found = compare_quality(builtin_metric("auto", original, [None] * 2), original, candidate, [None] * 2, 0)
    (output,) = found.outputs
    assert output.relative_error < 0.1
    assert bool(found.ruined) is ruined
    if ruined:
        assert (output.ruined_part.axis, output.ruined_part.first, output.ruined_part.last) == (1, 4, 5)


def test_a_metric_of_the_users_own_knows_which_entries_of_the_only_output_matter():
    original, candidate = detections(0.0, 1.0)
    own = Metric(
        "mean_box", over_all=lambda outputs, targets: float(np.mean([one[0][:, :4].mean() for one in outputs]))
    )
    assert not compare_quality(own, original, candidate, [None] * 2, 0).ruined


def test_scattered_small_entries_of_many_are_no_part_of_another_scale():
    random = np.random.default_rng(4)
    truth = random.normal(0, 1, (100, 64)) * np.where(np.arange(64) % 2, 1.0, 0.01)
    original, candidate = batches(truth), batches(truth + random.normal(0, 0.05, truth.shape))
    (output,) = output_agreements(detect_outputs(original), candidate, original)
    assert output.ruined_part is None


def test_rows_of_a_map_are_places_and_not_quantities():
    truth = np.random.default_rng(5).normal(0, 1, (100, 3, 8, 8))
    truth[:, :, :2] *= 0.001
    original = batches(truth)
    candidate = batches(np.where(np.arange(8)[:, None] < 2, 0, truth))
    (output,) = output_agreements(detect_outputs(original), candidate, original)
    assert not output.ruined
