"""Tests of the pictures of training and sensitivity: their numbers are read back from the drawing."""

from __future__ import annotations

import math
import re

from omgoptim.render import curves
from omgoptim.render.lists import sensitivities
from omgoptim.reports import EfficiencyReport, Training


def drawn_training(training: Training, control: Training | None = None) -> str:
    return curves.learning_curve(training, control, "how it went", ("with the teacher", "without the teacher"))


def points_of(picture: str, kind: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(rf'class="curve {kind}" points="([^"]+)"', picture)
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in lines]


def test_a_curve_ends_with_its_round_and_a_higher_loss_lies_higher(pruned: EfficiencyReport) -> None:
    assert pruned.training
    picture = drawn_training(pruned.training)
    losses = points_of(picture, "loss")
    assert [len(run) for run in losses] == [2, 2, 2]
    drawn = [y for run in losses for _, y in run]
    told = [epoch.loss for epoch in pruned.training.epochs]
    assert sorted(range(6), key=lambda i: -drawn[i]) == sorted(range(6), key=lambda i: told[i])
    assert picture.count('class="pick"') == 2 * sum(epoch.best for epoch in pruned.training.epochs)
    assert "round 3, epoch 2: quality 0.9832, kept" in picture


def test_quality_without_numbers_has_no_curve_and_a_loss_that_is_none_leaves_a_gap(pruned: EfficiencyReport) -> None:
    assert pruned.training
    epochs = [epoch.model_copy(update={"quality": None, "round": 1}) for epoch in pruned.training.epochs]
    epochs[2] = epochs[2].model_copy(update={"loss": math.nan})
    picture = drawn_training(pruned.training.model_copy(update={"epochs": epochs}))
    assert points_of(picture, "quality") == []
    assert [len(run) for run in points_of(picture, "loss")] == [2, 3]
    assert "nan" not in picture
    assert 'aria-label="Loss over the epochs"' in picture


def test_one_epoch_is_no_picture_and_equal_losses_are_one(pruned: EfficiencyReport) -> None:
    assert pruned.training
    one = pruned.training.model_copy(update={"epochs": pruned.training.epochs[:1]})
    assert drawn_training(one) == ""
    flat = pruned.training.model_copy(update={"epochs": [pruned.training.epochs[0]] * 2})
    assert len(points_of(drawn_training(flat), "loss")[0]) == 2


def test_small_curves_share_their_scale_and_begin_at_no_drop(pruned: EfficiencyReport) -> None:
    found = sensitivities(pruned)
    drawn = points_of(curves.sensitivity_multiples(found, 0.01), "drop")
    assert len(drawn) == len(found) == 11
    heights = [run[0][1] - run[-1][1] for run in drawn]
    most = found[0].points[-1].quality_drop
    for height, slack in zip(heights, found, strict=True):
        assert abs(height - heights[0] * slack.points[-1].quality_drop / most) <= 0.2


def test_more_layers_than_fit_are_left_out_and_the_guard_is_drawn_only_where_it_is_known(
    pruned: EfficiencyReport,
) -> None:
    found = sensitivities(pruned) * 3
    picture = curves.sensitivity_multiples(found, None)
    assert len(points_of(picture, "drop")) == curves.MOST_LAYERS
    assert 'class="guard"' not in picture
    assert curves.sensitivity_multiples([], 0.01) == ""


def test_a_control_is_a_second_line_on_the_same_scale_with_a_legend(distilled: EfficiencyReport) -> None:
    assert distilled.training
    assert distilled.control
    assert distilled.control.training
    picture = drawn_training(distilled.training, distilled.control.training)
    (student,), (control,) = points_of(picture, "quality"), points_of(picture, "quality control")
    assert len(student) == len(control) == 10
    assert all(mine[0] == other[0] and mine[1] < other[1] for mine, other in zip(student, control, strict=True))
    assert len(points_of(picture, "loss control")) == 1
    assert picture.count('class="key') == 2
    assert ">with the teacher</text>" in picture
    assert ">without the teacher</text>" in picture
    assert "round 1, epoch 9: control, quality 0.9513, kept" in picture


def test_a_control_that_stopped_early_is_shorter_and_alone_a_curve_has_no_legend(
    distilled: EfficiencyReport,
) -> None:
    assert distilled.training
    assert distilled.control
    assert distilled.control.training
    short = distilled.control.training.model_copy(update={"epochs": distilled.control.training.epochs[:3]})
    picture = drawn_training(distilled.training, short)
    assert len(points_of(picture, "quality control")[0]) == 3
    assert len(points_of(picture, "quality")[0]) == 10
    alone = drawn_training(distilled.training)
    assert "control" not in alone
    assert 'class="key' not in alone
    none = short.model_copy(update={"epochs": []})
    assert drawn_training(distilled.training, none) == alone
