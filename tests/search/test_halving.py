"""Successive halving: who goes on, and what trials that stopped early are worth beside those that did not."""

from __future__ import annotations

import numpy as np
import pytest

from omgoptim.architecture_search.halving import (
    expected_final_qualities,
    is_promoted,
    most_promising,
    qualities_at_rung,
    rung_epochs,
)


def test_the_best_third_goes_on() -> None:
    others = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert is_promoted(0.6, others)
    assert is_promoted(0.45, others)
    assert not is_promoted(0.35, others)
    assert is_promoted(0.0, [])


def test_a_quality_that_is_no_number_does_not_go_on() -> None:
    assert not is_promoted(float("nan"), [])


def test_a_trial_that_stopped_early_gets_the_gain_of_those_that_went_on() -> None:
    histories = [(0.5, 0.7, 0.8), (0.4, 0.5), (0.3,)]
    # from the first rung to the second: +0.2 and +0.1; from the second to the third: +0.1
    np.testing.assert_allclose(expected_final_qualities(histories), [0.8, 0.6, 0.3 + 0.15 + 0.1])
    assert expected_final_qualities([]).tolist() == []


def test_promoting_only_the_best_does_not_pass_for_a_gain() -> None:
    histories = [(0.9, 0.9), (0.1,), (0.2,)]
    np.testing.assert_allclose(expected_final_qualities(histories), [0.9, 0.1, 0.2])


def test_the_best_three_are_those_that_are_expected_to_end_best() -> None:
    histories = [(0.5, 0.7, 0.8), (0.6,), (0.2,), (0.55, 0.6)]
    # the first gains 0.2 and 0.1 from rung to rung, the last 0.05: 0.8, 0.6 + 0.125 + 0.1, 0.425, 0.6 + 0.1
    assert most_promising(histories) == [1, 0, 3]
    assert qualities_at_rung(histories, 1) == [0.7, 0.6]


@pytest.mark.parametrize(("epochs", "rungs"), [(27, (3, 6, 18)), (9, (1, 2, 6)), (3, (1, 2)), (1, (1,))])
def test_rungs_are_whole_epochs_that_sum_to_all(epochs: int, rungs: tuple[int, ...]) -> None:
    assert rung_epochs(epochs) == rungs
