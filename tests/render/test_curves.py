"""Tests of the drawings of training and sensitivity: their numbers are those of the report."""

from __future__ import annotations

import math

from omgoptim.render import charts
from omgoptim.render.blocks import Curves
from omgoptim.render.lists import sensitivities
from omgoptim.reports import EfficiencyReport, Epoch, Training


def drawn(training: Training, control: list[Epoch] | None = None) -> Curves:
    picture = charts.learning_curve(training.epochs, control or [], "how it went", ("with the teacher", "without"))
    assert picture is not None
    return picture


def test_a_curve_has_the_loss_and_the_quality_of_each_epoch_and_marks_those_that_were_kept(
    pruned: EfficiencyReport,
) -> None:
    assert pruned.training
    loss, quality = drawn(pruned.training).panels
    epochs = pruned.training.epochs
    assert loss.curves[0].values == tuple(epoch.loss for epoch in epochs)
    assert quality.curves[0].values == tuple(epoch.quality for epoch in epochs)
    assert quality.curves[0].rounds == (1, 1, 2, 2, 3, 3)
    assert [epochs[place].best for place in loss.curves[0].kept] == [True] * sum(epoch.best for epoch in epochs)


def test_quality_without_numbers_has_no_panel_and_a_loss_that_is_none_is_a_gap(pruned: EfficiencyReport) -> None:
    assert pruned.training
    epochs = [epoch.model_copy(update={"quality": None}) for epoch in pruned.training.epochs]
    epochs[2] = epochs[2].model_copy(update={"loss": math.nan})
    picture = drawn(pruned.training.model_copy(update={"epochs": epochs}))
    (loss,) = picture.panels
    assert loss.curves[0].values[2] is None
    assert picture.title == "Loss over the epochs"


def test_one_epoch_is_no_picture(pruned: EfficiencyReport) -> None:
    assert pruned.training
    assert charts.learning_curve(pruned.training.epochs[:1], [], "", ("", "")) is None


def test_small_curves_begin_at_no_drop_and_the_most_sensitive_are_drawn(pruned: EfficiencyReport) -> None:
    found = sensitivities(pruned)
    picture = charts.sensitivity_multiples(found * 3, 0.01)
    assert picture is not None
    assert len(picture.cells) == charts.MAX_LAYERS
    for cell, one in zip(picture.cells, found, strict=False):
        assert cell.points == ((0.0, 0.0), *((point.amount, point.quality_drop) for point in one.points))
        assert cell.over == (one.worst.quality_drop > 0.01)
    assert charts.sensitivity_multiples([], 0.01) is None


def test_a_control_is_a_second_curve_with_a_name_and_may_be_shorter(distilled: EfficiencyReport) -> None:
    assert distilled.training
    assert distilled.control
    assert distilled.control.training
    control = distilled.control.training.epochs
    for panel in drawn(distilled.training, control[:3]).panels:
        student, other = panel.curves
        assert (student.name, other.name, other.control) == ("with the teacher", "without", True)
        assert (len(student.values), len(other.values)) == (10, 3)
    (alone,) = drawn(distilled.training).panels[1].curves
    assert alone.name == ""
