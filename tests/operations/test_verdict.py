"""The words of a report, and the numbers that allow them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from omgoptim.measure.agreement import OutputAgreement, OutputPart
from omgoptim.measure.quality import LostClass, Quality
from omgoptim.models.outputs import OutputSpec
from omgoptim.operations.timing import BUSY, OVERLOADED
from omgoptim.operations.verdict import (
    drop_with_margin,
    is_gain,
    load_warnings,
    outcome_of,
    quality_sentence,
    quality_warnings,
    size_phrase,
    speed_phrase,
    verdict_sentence,
)
from omgoptim.reports import Gains, Measurement

BEFORE = Measurement(runtime="torch_eager", samples=600)


def gains(speedup=None, low=None, high=None, size=None) -> Gains:
    return Gains(speedup=speedup, speedup_low=low, speedup_high=high, size_ratio=size, launches=5)


def quality(drop=0.0, low=-0.001, high=0.001, metric="top1_accuracy", samples=600) -> Quality:
    agreement = metric.endswith("agreement")
    return Quality(metric, 0.95, 0.95 - drop, drop, low, high, 0.99, samples, is_agreement=agreement)


def test_faster_is_said_only_when_the_interval_lies_above_1() -> None:
    words = speed_phrase(gains(2.314, 2.28, 2.35))
    assert words == "2.31x faster (2.28 to 2.35, 95 % over 5 launches)"
    assert "no significant speedup: 1.04x" in speed_phrase(gains(1.04, 0.99, 1.09))
    assert speed_phrase(gains(0.8, 0.7, 0.9)).startswith("slower: 0.80x speed")


def test_a_single_launch_is_neither_faster_nor_slower() -> None:
    for speedup in (0.5, 3.0):
        words = speed_phrase(gains(speedup))
        assert "faster" not in words
        assert "slower" not in words
        assert "point estimate" in words


def test_an_overloaded_machine_gives_no_claim_on_speed() -> None:
    words = speed_phrase(gains())
    assert words == "speed undecided: the machine was overloaded"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (3.914, "3.91x smaller on disk"),
        (1.02, "1.02x smaller on disk"),
        (1.019, "about the same size on disk"),
        (0.985, "about the same size on disk"),
        (0.5, "2.00x larger on disk"),
        (None, "size not compared"),
    ],
)
def test_the_size_is_told_as_what_it_is(ratio: float | None, words: str) -> None:
    assert size_phrase(gains(size=ratio)) == words


def test_quality_is_told_with_the_drop_and_its_interval() -> None:
    words = quality_sentence(BEFORE, quality(0.005, -0.0012, 0.0113))
    assert words == ("top1 accuracy 0.9500 -> 0.9450 on 600 samples (drop +0.0050, 95 %: -0.0012 to +0.0113).")


def test_an_unknown_interval_is_left_out_and_warned_of() -> None:
    unknown = quality(0.005, -math.inf, math.inf, metric="mine")
    assert "95 %" not in quality_sentence(BEFORE, unknown)
    (warning,) = quality_warnings(unknown, 0.01, real_data=True)
    assert "has no confidence interval" in warning
    assert "inf" not in warning


def test_quality_that_was_not_measured_is_not_told_as_a_number() -> None:
    assert quality_sentence(BEFORE, None) == "Quality was not measured."
    assert quality_warnings(None, 0.01, real_data=True) == []


def test_random_inputs_give_no_accuracy_and_the_report_says_so() -> None:
    (warning,) = quality_warnings(quality(metric="top1_agreement"), 0.01, real_data=False)
    assert "random inputs" in warning
    assert "not accuracy" in warning


def test_agreement_on_real_data_is_not_called_accuracy() -> None:
    (warning,) = quality_warnings(quality(metric="cosine_agreement"), 0.01, real_data=True)
    assert "not accuracy" in warning


def test_agreement_on_data_with_labels_does_not_say_that_there_are_none() -> None:
    (warning,) = quality_warnings(quality(metric="cosine_agreement"), 0.01, real_data=True, labelled=True)
    assert "does not read the data's targets" in warning


def test_a_guard_that_cannot_be_decided_is_told_with_how_many_samples_would() -> None:
    (warning,) = quality_warnings(quality(0.0, -0.02, 0.02), 0.01, real_data=True)
    assert "600 samples cannot decide" in warning
    assert "about 2,400 samples would decide" in warning
    (warning,) = quality_warnings(quality(0.01, -0.02, 0.04), 0.01, real_data=True)
    assert "no evaluation set can decide this" in warning
    (warning,) = quality_warnings(quality(0.01 + 2e-6, -0.02, 0.04), 0.01, real_data=True)
    assert warning.endswith("no evaluation set can decide this")  # 4e14 samples would


def test_a_drop_that_is_only_rounding_beyond_the_guard_is_decided() -> None:
    assert quality_warnings(quality(0.0, 0.0, 5e-7), 0.0, real_data=True) == []


def test_the_margin_follows_from_the_interval_and_is_at_most_half_of_the_guard() -> None:
    assert drop_with_margin(0.002, 0.004, 0.01) == pytest.approx(0.004)  # many samples: the upper end
    assert drop_with_margin(0.002, 0.05, 0.01) == pytest.approx(0.007)  # few samples
    assert drop_with_margin(0.002, math.inf, 0.01) == pytest.approx(0.007)  # a metric without an interval
    assert drop_with_margin(0.002, 0.05, 0.0) == 0.002
    assert drop_with_margin(0.002, -0.1, 0.01) == 0.002


@pytest.mark.parametrize(("drop", "low", "high"), [(0.0, -0.005, 0.005), (0.05, 0.02, 0.08)])
def test_a_decided_guard_needs_no_warning(drop: float, low: float, high: float) -> None:
    assert quality_warnings(quality(drop, low, high), 0.01, real_data=True) == []


@pytest.mark.parametrize(
    ("found", "gain"),
    [
        (gains(2.0, 1.9, 2.1, size=1.0), True),
        (gains(1.05, 0.98, 1.12, size=1.0), False),
        (gains(0.9, 0.8, 0.95, size=3.9), True),
        (gains(0.9, 0.8, 0.95, size=1.01), False),
        (gains(size=1.0), False),
        (gains(), False),
        (gains(1.5), True),
        (gains(1.05), False),
    ],
)
def test_a_gain_is_smaller_or_faster_by_what_was_measured(found: Gains, gain: bool) -> None:
    assert is_gain(found) is gain


def test_a_class_that_is_lost_behind_the_accuracy_is_warned_of() -> None:
    lost = replace(quality(0.002, -0.001, 0.004), lost_classes=(LostClass(1, 20, 0.95, 0.1),))
    (warning,) = quality_warnings(lost, 0.01, real_data=True)
    assert warning.startswith("the recall of class 1 fell from 95% to 10% (20 samples), which the accuracy on all 600")
    shown = replace(quality(0.3, 0.2, 0.4), lost_classes=lost.lost_classes)
    (warning,) = quality_warnings(shown, 0.01, real_data=True)
    assert warning.endswith("fell from 95% to 10% (20 samples)")  # the drop of the accuracy says so itself


def test_a_quiet_machine_needs_no_warning_and_a_busy_one_gets_the_one_that_fits() -> None:
    assert load_warnings(None) == load_warnings(BUSY) == []
    (busy,) = load_warnings((BUSY + OVERLOADED) / 2)
    assert "intervals wider" in busy
    (overloaded,) = load_warnings(OVERLOADED + 0.01)
    assert "no speedup is reported" in overloaded


def test_a_ruined_output_that_the_metric_never_reads_fails_the_guard_and_is_named_first() -> None:
    spec = OutputSpec("boxes", 0, ("batch", 4), "float32", "values", "")
    boxes = OutputAgreement(spec, 0.31, relative_error=0.83, read=False)
    ruined = replace(quality(), outputs=(boxes,))
    gained = gains(2.314, 2.28, 2.35)
    assert outcome_of(gained, ruined, 0.01) == "guard_failed"
    words = verdict_sentence("guard_failed", "pruning", gained, ruined, 0.01)
    first = "Output 'boxes' (relative error 0.83, above 0.5) was ruined; the metric does not read it."
    assert words.startswith(first)
    both = verdict_sentence("guard_failed", "pruning", gained, replace(ruined, drop=0.3), 0.01)
    assert both.startswith(f"{first} The quality drop 0.3000 is above 0.01 too. pruning is ")
    assert "above 0.01" not in words
    part = replace(boxes, relative_error=0.02, ruined_part=OutputPart(1, 4, 83, 4.18), read=True)
    words = verdict_sentence("guard_failed", "int8", gained, replace(quality(), outputs=(part,)), 0.01)
    lost = "entries 4 to 83 of dimension 1, of a smaller scale: relative error 4.18, above 0.9"
    assert words.startswith(f"Output 'boxes' ({lost}) was ruined; the metric does not show it.")
    read = replace(quality(), outputs=(replace(boxes, read=True),))
    assert outcome_of(gained, read, 0.01) == "ok"
