"""Tests of the texts of rounds, training and sensitivity."""

from __future__ import annotations

import math

import pytest

from omgoptim.render.lists import Sensitivity, extremes, sensitivities
from omgoptim.render.sections.layers import amount_within_guard, quality_drop_bars
from omgoptim.render.sections.training import round_columns, rounds_note, training_text
from omgoptim.reports import EfficiencyReport, Epoch, Round, SensitivityPoint, Training


def epoch(number: int, loss: float, *, of_round: int = 1, quality: float | None = None, best: bool = False) -> Epoch:
    return Epoch(round=of_round, epoch=number, loss=loss, quality=quality, learning_rate=0.1, seconds=1, best=best)


def training(*epochs: Epoch, **more: object) -> Training:
    record = {"optimizer": "sgd", "loss": "cross-entropy", "trained_params": 10, "total_params": 10, "seconds": 7}
    return Training.model_validate(record | {"epochs": epochs} | more)


def test_training_is_one_line() -> None:
    record = training(epoch(1, 2.0, quality=0.5), epoch(2, 0.5, quality=0.75, best=True), metric="top1_accuracy")
    assert training_text(record) == (
        "2 epochs; sgd, cross-entropy; loss 2 -> 0.5; kept epoch 2 (top1_accuracy 0.7500); 7 s; all 10 parameters"
    )


def test_in_rounds_the_loss_is_that_of_the_last_and_the_kept_epoch_has_its_round() -> None:
    record = training(epoch(1, 2.0, best=True), epoch(1, 3.0, of_round=2), epoch(2, 1.0, of_round=2, best=True))
    assert "3 epochs in 2 rounds; sgd, cross-entropy; loss in round 2 3 -> 1; kept epoch 2 of round 2;" in (
        training_text(record)
    )


def test_adapters_an_interruption_and_an_early_end_are_told() -> None:
    record = training(
        epoch(1, math.nan), trained_params=1200, total_params=22_000_000, resumed=2, stopped="the loss is no number"
    )
    text = training_text(record)
    assert "1 epoch;" in text
    assert "loss no number;" in text
    assert "1.2 k of 22 M parameters; resumed 2 times; stopped early: the loss is no number" in text


def test_what_became_of_the_teachers_outputs_is_told_where_there_is_a_teacher() -> None:
    record = training(epoch(1, 2.0), teacher_outputs="computed for every batch: the inputs are augmented")
    assert "; the teacher's outputs computed for every batch: the inputs are augmented" in training_text(record)
    assert "teacher" not in training_text(training(epoch(1, 2.0)))


def test_training_that_ended_before_its_first_epoch_says_why() -> None:
    assert training_text(training(stopped="the loss is no number")) == ("no epoch ended; the loss is no number")


def test_a_column_that_nothing_is_known_of_is_left_out() -> None:
    bare = [Round(number=1, quality_taken=0.5), Round(number=2, quality_taken=0.25, kept=True)]
    assert round_columns(bare) == {"round": ["1", "2"], "compressed": ["0.5000", "0.2500"], "kept": ["", "✓"]}
    timed = [Round(number=1, amount=0.325, speedup=2.0, params=1000)]
    assert round_columns(timed) == {
        "round": ["1"],
        "amount": ["32.5%"],
        "speedup": ["2.00x"],
        "parameters": ["1 k"],
    }


def test_the_note_names_only_the_steps_that_there_were() -> None:
    assert rounds_note([Round(number=1, quality_taken=0.5)]).endswith("right after pruning or factorization")
    trained = rounds_note([Round(number=1, quality_reestimated=0.5, quality_trained=0.0)])
    assert trained.endswith("after batch-norm statistics were estimated again, after training")
    assert rounds_note([Round(number=1, params=10)]) == ""


def test_the_most_sensitive_layer_comes_first_and_its_slack_is_read_off_the_guard(pruned: EfficiencyReport) -> None:
    found = sensitivities(pruned)
    assert [slack.path for slack in found[:3]] == ["0", "3.shortcut", "4.shortcut"]
    assert [amount_within_guard(slack) for slack in found[:2]] == ["50%", "75%"]
    assert found[0].worst.quality_drop == 0.1212
    assert len(extremes(found)) == 10
    assert extremes(found)[-1] is found[-1]


@pytest.mark.parametrize(("drops", "within"), [((0.0, 0.0), "50%"), ((0.02, 0.0), "nothing"), ((0.01, 0.02), "25%")])
def test_slack_ends_at_the_first_drop_that_is_too_much(
    drops: tuple[float, ...], within: str, pruned: EfficiencyReport
) -> None:
    points = [
        SensitivityPoint(path="a", amount=amount, quality=0.9, quality_drop=drop)
        for amount, drop in zip((0.25, 0.5), drops, strict=True)
    ]
    (slack,) = sensitivities(pruned.model_copy(update={"sensitivity": points[::-1]}))
    assert amount_within_guard(slack) == within
    assert [point.amount for point in slack.points] == [0.25, 0.5]


def test_a_bar_is_as_high_as_its_drop_and_a_gain_is_flat() -> None:
    points = [
        SensitivityPoint(path="a", amount=a, quality=0.9, quality_drop=d)
        for a, d in ((0.1, -1.0), (0.2, 0.5), (0.3, 1.0))
    ]
    slack = Sensitivity("a", tuple(points), None)
    assert quality_drop_bars(slack, 1.0) == "▁▅█"
    assert quality_drop_bars(slack, 0.0) == "▁██"
    assert amount_within_guard(slack) == ""
