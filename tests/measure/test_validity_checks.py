"""Chance level of the original, and outputs that depend on the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omgoptim.measure.validity_checks import (
    batch_dependence,
    chance_level_reason,
    chance_level_summary,
    missing_classes_notes,
)
from omgoptim.models.outputs import ModelOutputs, OutputSpec
from omgoptim.models.samples import Samples


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


ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)


def samples(*sizes: int) -> Samples:
    ends = np.cumsum(sizes)
    return Samples([{"x": ROWS[end - size : end]} for size, end in zip(sizes, ends, strict=True)], [None] * len(sizes))


def by_row(batch: Any) -> list[NDArray[Any]]:
    return [batch["x"] * 2, batch["x"].sum(1, keepdims=True)]


@pytest.mark.parametrize("sizes", [(8,), (3, 3, 2), (1, 1, 1)])
def test_a_model_that_works_row_by_row_does_not_depend_on_the_batch(sizes: tuple[int, ...]) -> None:
    assert batch_dependence(by_row, samples(*sizes)) is None


def test_statistics_over_the_batch_are_found_and_counted() -> None:
    note = batch_dependence(lambda batch: [batch["x"] - batch["x"].mean(0)], samples(8), "batch statistics")
    assert note is not None
    assert "8 of 8 samples" in note
    assert note.endswith("possible cause: batch statistics")


def test_an_offset_does_not_hide_statistics_over_the_batch() -> None:
    note = batch_dependence(lambda batch: [1000 + 0.01 * (batch["x"] - batch["x"].mean(0))], samples(8))
    assert note is not None
    assert batch_dependence(lambda batch: [np.float32(1000) + np.float32(0.01) * batch["x"]], samples(8)) is None


def test_a_branch_that_few_samples_take_alone_is_found() -> None:
    def branching(batch: Any) -> list[NDArray[Any]]:
        return [batch["x"] * (2 if batch["x"].mean() > 3 else 1)]

    note = batch_dependence(branching, samples(8))  # only the first row's mean is below 3
    assert note is not None
    assert "1 of 8 samples" in note


def test_a_state_whose_batch_is_the_second_axis_is_compared_too() -> None:
    def state(batch: Any) -> list[NDArray[Any]]:
        return [(batch["x"] - batch["x"].mean(0))[None]]

    assert batch_dependence(state, samples(8)) is not None
    assert batch_dependence(lambda batch: [batch["x"][None]], samples(8)) is None


def test_a_matrix_of_similarities_between_samples_depends_on_the_batch() -> None:
    note = batch_dependence(lambda batch: [batch["x"], batch["x"] @ batch["x"].T], samples(8))
    assert note is not None
    assert "shape (8, 8) for 8 samples" in note


def test_an_output_of_as_many_rows_as_pass_a_test_answers_nothing() -> None:
    assert batch_dependence(lambda batch: [batch["x"][batch["x"][:, 0] < 12]], samples(8)) is None


def test_rounding_is_no_dependence_and_integers_are_not_compared() -> None:
    assert batch_dependence(lambda batch: [batch["x"] * (1 + 1e-6 * len(batch["x"]))], samples(8)) is None
    assert batch_dependence(lambda batch: [np.arange(len(batch["x"]))], samples(8)) is None


def test_a_batch_that_the_model_does_not_take_answers_nothing() -> None:
    def one_only(batch: Any) -> list[NDArray[Any]]:
        if len(batch["x"]) > 1:
            raise RuntimeError("batch 1 only")
        return [batch["x"]]

    assert batch_dependence(one_only, samples(8)) is None
    assert batch_dependence(by_row, samples(1)) is None


def test_one_by_one_keeps_every_sample_with_its_target() -> None:
    both = Samples([{"x": ROWS[:3]}, {"x": ROWS[3:5]}], [np.array([0, 1, 2]), np.array([3, 4])])
    single = both.one_by_one()
    assert [batch["x"].tolist() for batch in single.batches] == [[row] for row in ROWS[:5].tolist()]
    assert [target.tolist() for target in single.targets] == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        (np.zeros(200, np.int64), 10, "the 200 evaluation samples cover 1 of 10 classes"),
        (np.arange(2000) // 50, 1000, "the 2,000 evaluation samples cover 40 of 1,000 classes"),
        (np.arange(2000) % 700, 1000, ""),
        (np.arange(20), 1000, ""),
        (np.zeros((50, 4), np.int64), 10, ""),
    ],
)
def test_data_sorted_by_class_is_noticed_by_the_classes_that_it_lacks(labels: Any, classes: int, said: str) -> None:
    scores = OutputSpec("logits", 0, ("batch", classes), "float32", "class_scores", "", class_axis=-1)
    notes = missing_classes_notes(ModelOutputs((scores,), "classes", 0), [labels])
    assert " ".join(notes).startswith(said)
    assert bool(notes) == bool(said)
