"""Tests of the words on a control and on the curves of a distillation."""

from __future__ import annotations

import math

import pytest

from omgoptim.render import claims
from omgoptim.render.sections import training as sections
from omgoptim.reports import Control, EfficiencyReport, Epoch, Training


def training(*qualities: float | None) -> Training:
    epochs = [
        Epoch(epoch=number, loss=1.0, quality=quality, learning_rate=0.1, seconds=1)
        for number, quality in enumerate(qualities, start=1)
    ]
    return Training(epochs=epochs, optimizer="sgd", loss="l", trained_params=1, total_params=1, seconds=1)


def with_curves(report: EfficiencyReport, student: Training, control: Training | None) -> EfficiencyReport:
    alone = Control(quality=0.9, gain=0.01, training=control) if control else None
    return report.model_copy(update={"training": student, "control": alone})


@pytest.mark.parametrize(
    ("gain", "low", "high", "claim", "tone"),
    [
        (0.01, 0.002, 0.018, "distillation gained 0.0100 (95 % interval +0.0020 to +0.0180)", "better"),
        (-0.01, -0.018, -0.002, "distillation lost 0.0100 (95 % interval -0.0180 to -0.0020)", "worse"),
        (
            0.01,
            -0.002,
            0.022,
            "no significant effect of distillation (+0.0100, 95 % interval -0.0020 to +0.0220)",
            "open",
        ),
        (0.01, 0.0, 0.02, "no significant effect of distillation (+0.0100, 95 % interval +0.0000 to +0.0200)", "open"),
        (-0.01, None, None, "distillation -0.0100 (point estimate)", "open"),
        (None, None, None, "", "same"),
    ],
)
def test_a_teacher_brought_something_only_where_the_interval_excludes_nothing(
    gain: float | None, low: float | None, high: float | None, claim: str, tone: str
) -> None:
    control = Control(quality=0.9, gain=gain, gain_low=low, gain_high=high)
    assert claims.control_claim(control) == (claim, tone)


def test_the_control_is_told_with_what_it_reached_and_which_of_the_two_is_the_artifact() -> None:
    lost = sections.control_text(Control(quality=0.9, gain=0.01, gain_low=0.002, gain_high=0.018))
    assert lost == (
        "the same student, trained as long without the teacher, reaches 0.9000; distillation gained 0.0100 "
        "(95 % interval +0.0020 to +0.0180); the distilled one is the artifact: it was "
        "not worse on the selection samples"
    )
    won = sections.control_text(Control(quality=0.9, gain=-0.01, kept=True, training=training(0.5, 0.9)))
    assert "reaches 0.9000; distillation -0.0100 (point estimate); this one is the artifact: it was better" in won
    assert "; 2 epochs; sgd, l; loss 1; " in won


def test_a_control_without_a_quality_has_no_number() -> None:
    assert sections.control_text(Control(quality=None)).startswith(
        "the same student, trained as long without the teacher; the distilled one is the artifact"
    )


def test_both_curves_share_one_scale_and_say_which_still_rises(distilled: EfficiencyReport) -> None:
    report = with_curves(distilled, training(0.5, 0.75, 1.0), training(0.0, 0.5, 0.25))
    assert sections.curve_lines(report) == [
        "▅▆█ 0.5000 -> 1.0000 with the teacher, best in the last epoch",
        "▁▅▃ 0.0000 -> 0.2500 without the teacher",
    ]


def test_an_epoch_without_a_quality_has_no_bar_and_equal_ones_are_full(distilled: EfficiencyReport) -> None:
    report = with_curves(distilled, training(0.5, None, math.nan, 0.5), None)
    assert sections.curve_lines(report) == ["██ 0.5000 -> 0.5000 with the teacher"]


def test_of_many_epochs_the_bars_are_evenly_spread_and_end_with_the_last(distilled: EfficiencyReport) -> None:
    report = with_curves(distilled, training(*[number / 999 for number in range(1000)]), None)
    bars, _, rest = sections.curve_lines(report)[0].partition(" ")
    assert len(bars) == 40
    assert bars == "".join(sorted(bars))
    assert (bars[0], bars[-1]) == ("▁", "█")
    assert rest.startswith("0.0000 -> 1.0000")


def test_one_epoch_has_no_curve_nor_has_another_verb(distilled: EfficiencyReport, pruned: EfficiencyReport) -> None:
    assert sections.curve_lines(with_curves(distilled, training(0.5), None)) == []
    assert sections.curve_lines(pruned) == []


@pytest.mark.parametrize(
    ("qualities", "rising"),
    [((0.5, 0.9), True), ((0.9, 0.9), False), ((0.9, 0.5), False), ((0.9,), False), ((), False)],
)
def test_a_last_epoch_is_the_best_only_where_it_beats_every_earlier_one(
    qualities: tuple[float, ...], rising: bool
) -> None:
    assert sections.is_last_epoch_best(training(*qualities)) is rising


def test_the_table_calls_the_sides_teacher_and_student_only_where_one_learnt_from_the_other(
    distilled: EfficiencyReport, pruned: EfficiencyReport
) -> None:
    assert claims.column_names(distilled) == ("teacher", "student")
    assert claims.column_names(pruned) == ("before", "after")
    row = claims.comparison_rows(distilled)[-1]
    assert (row.label, row.before, row.after, row.tone) == ("without the teacher", "", "0.9540", "better")
    without = distilled.model_copy(update={"control": None})
    assert claims.comparison_rows(without) == claims.comparison_rows(distilled)[:-1]
