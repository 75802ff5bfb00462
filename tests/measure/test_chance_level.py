from __future__ import annotations

import numpy as np
import pytest

from omgoptim.measure.validity_checks import chance_level_reason, chance_level_summary


@pytest.mark.parametrize(
    ("value", "at_chance"), [(0.70, True), (0.75, True), (0.79, True), (0.80, False), (0.98, False)]
)
def test_an_accuracy_is_compared_with_the_most_frequent_class(value: float, at_chance: bool) -> None:
    targets = [np.array([0, 0, 0, 1])] * 100  # 0.75 + 2 sqrt(0.75 x 0.25 / 400) = 0.793
    assert (chance_level_reason("top1_accuracy", value, targets) is not None) == at_chance


def test_the_sentence_has_both_numbers_and_ignored_labels_do_not_count() -> None:
    why = chance_level_reason("top1_accuracy", 0.5, [np.array([[0, 1], [1, -100]]), np.array([[0, -100]])])
    assert why is not None
    assert "its accuracy is 0.5000" in why
    assert "gives 0.5000 (4 labels)" in why


def test_a_perfect_model_is_no_guess_though_all_labels_are_the_same() -> None:
    assert chance_level_reason("top1_accuracy", 1.0, [np.zeros(50, np.int64)]) is None


def test_r2_at_or_below_zero_is_chance() -> None:
    assert chance_level_reason("r2", 0.0, []) is not None
    assert chance_level_reason("r2", 0.01, []) is None


def test_an_undecidable_chance_level_is_none() -> None:
    for metric, value, targets in [
        ("my_metric", 0.0, [np.zeros(4, np.int64)]),
        ("top1_accuracy", None, [np.zeros(4, np.int64)]),
        ("top1_accuracy", 0.1, [None]),
        ("top1_agreement", 0.1, [np.zeros(4, np.int64)]),
    ]:
        assert chance_level_summary(metric, value, targets) == ""  # type: ignore[arg-type]
    assert chance_level_summary(None, 0.1, []) == ""
