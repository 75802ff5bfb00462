"""Labels as losses of torch take them: one-hot rows, 0 and 1 as floats, -1 and 1, counts; and those of next tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from omgoptim.errors import DataError
from omgoptim.measure.builtin_metrics import builtin_metric
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.measure.validity_checks import chance_level_reason
from omgoptim.models.labels import label_form, plain_labels, predicts_next_token, refuse_out_of_range, shifted
from omgoptim.models.output_detection import OutputOptions, describe_outputs
from omgoptim.models.outputs import ModelOutputs
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes.signature import Signature
from omgoptim.training.losses import loss_of

CLASSES = np.array([0, 2, 1, 0, 2, 2, 1, 0, 1, 2])
ONE_HOT = np.eye(3, dtype=np.float32)[CLASSES]
YES = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
SEVERAL = np.array([[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]] * 3, np.float32)
SCORES = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
LOGITS = SCORES[:, :1]


def described(scores: np.ndarray, labels: np.ndarray, metric: str = "auto") -> ModelOutputs:
    outputs = [[scores[:6]], [scores[6:]]]
    return describe_outputs(
        Signature((), "tensor"), outputs, [6, len(scores) - 6], [labels[:6], labels[6:]], OutputOptions(metric=metric)
    )


@pytest.mark.parametrize(
    ("labels", "form", "plain"),
    [
        (CLASSES, "index", CLASSES),
        (ONE_HOT, "one_hot", CLASSES),
        (ONE_HOT.astype(int), "one_hot", CLASSES),
        (YES, "index", YES),
        (YES.astype(np.float32), "binary", YES),
        (YES[:, None].astype(np.float64), "binary", YES[:, None]),
        (2 * YES - 1, "signed", YES),
        ((2 * YES - 1).astype(np.float32), "signed", YES),
        (SEVERAL, "binary", SEVERAL),
        (np.linspace(0, 1, 10), "index", np.linspace(0, 1, 10)),
        (np.ones(10), "index", np.ones(10)),
        (np.array([0.0, 1.0]), "index", np.array([0.0, 1.0])),
    ],
)
def test_the_form_of_labels_is_read_from_their_values(labels: np.ndarray, form: str, plain: np.ndarray) -> None:
    assert label_form([labels]) == form
    assert np.array_equal(plain_labels(labels, label_form([labels])), plain)
    assert np.array_equal(plain_labels(torch.from_numpy(labels), label_form([labels])).numpy(), plain)


def test_labels_that_do_not_count_keep_their_mark() -> None:
    labels = np.array([0.0, 1.0, -100.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    assert label_form([labels]) == "binary"
    assert plain_labels(labels, "binary").tolist() == [0, 1, -100, 1, 0, 1, 1, 0]
    assert plain_labels("text", "binary") == "text"


@pytest.mark.parametrize(
    ("scores", "labels", "kind", "form"),
    [
        (SCORES, ONE_HOT, "classes", "one_hot"),
        (SCORES, CLASSES.astype(np.float32), "classes", "whole"),
        (LOGITS, YES.astype(np.float32), "classes", "binary"),
        (LOGITS, (2 * YES - 1)[:, None], "classes", "signed"),
        (LOGITS, 10 * YES, "values", "count"),
        (LOGITS, np.linspace(0, 1, 10), "values", "index"),
        (np.ones((10, 4), np.float32), np.eye(4, dtype=int)[YES], "classes", "one_hot"),
        (np.ones((10, 3, 2), np.float32), np.eye(3, dtype=int)[CLASSES], "classes", "index"),  # tags of 3 tokens
    ],
)
def test_labels_in_any_form_belong_to_the_output_that_fits_them(
    scores: np.ndarray, labels: np.ndarray, kind: str, form: str
) -> None:
    found = described(scores, labels)
    assert (found.labels, found.label_form, found.target) == (kind, form, 0)
    assert found.specs[0].kind == ("class_scores" if kind == "classes" else found.specs[0].kind)


def test_labels_of_0_and_1_belong_to_the_score_beside_embeddings_whose_entries_could_be_classes() -> None:
    embeddings = np.random.default_rng(1).normal(size=(10, 4)).astype(np.float32)
    outputs = [[LOGITS[:6, 0], embeddings[:6], embeddings[:6]], [LOGITS[6:, 0], embeddings[6:], embeddings[6:]]]
    labels = YES.astype(np.float32)
    found = describe_outputs(
        Signature((), {"tuple": ["tensor"] * 3}), outputs, [6, 4], [labels[:6], labels[6:]], OutputOptions()
    )
    assert (found.labels, found.label_form, found.target) == ("classes", "binary", 0)
    assert [spec.kind for spec in found.specs] == ["class_scores", "values", "values"]


def test_metric_r2_takes_labels_of_0_and_1_for_values() -> None:
    assert described(LOGITS, YES.astype(np.float32), metric="r2").labels == "values"


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        (SCORES, ONE_HOT, (SCORES.argmax(1) == CLASSES).mean()),
        (LOGITS, YES.astype(np.float32), ((LOGITS[:, 0] > 0) == YES).mean()),
        (LOGITS, 2 * YES - 1, ((LOGITS[:, 0] > 0) == YES).mean()),
        (SCORES[:9], SEVERAL[:9], ((SCORES[:9] > 0) == SEVERAL[:9]).mean()),
    ],
)
def test_the_metric_is_the_accuracy_counted_by_hand(scores: np.ndarray, labels: np.ndarray, expected: float) -> None:
    metric = builtin_metric("auto", [[scores]], [labels], described(scores, labels))
    assert metric is not None
    assert metric.name == "top1_accuracy"
    assert metric.per_sample is not None
    assert metric.per_sample([[scores]], [labels], [[scores]]).mean() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        (SCORES, ONE_HOT, F.cross_entropy(torch.from_numpy(SCORES), torch.from_numpy(ONE_HOT))),
        (
            SCORES[:9],
            SEVERAL[:9],
            F.binary_cross_entropy_with_logits(torch.from_numpy(SCORES[:9]), torch.from_numpy(SEVERAL[:9])),
        ),
        (LOGITS, 2 * YES - 1, F.soft_margin_loss(torch.from_numpy(LOGITS[:, 0]), torch.from_numpy(2 * YES - 1))),
        (LOGITS, 10 * YES, F.mse_loss(torch.from_numpy(LOGITS[:, 0]), torch.from_numpy(10.0 * YES).float())),
    ],
)
def test_the_loss_is_torchs_own_for_labels_of_that_form(
    scores: np.ndarray, labels: np.ndarray, expected: torch.Tensor, policy: PathPolicy
) -> None:
    outputs, target = torch.from_numpy(scores), torch.from_numpy(labels)
    loss = loss_of(RequestedFunction("auto", policy, 10, outputs=described(scores, labels)), outputs, target)
    assert loss is not None
    loss.check(target)
    torch.testing.assert_close(loss.function(outputs, target), expected)


def test_a_label_that_is_no_class_is_refused_and_one_that_does_not_count_is_not() -> None:
    refuse_out_of_range(np.array([0, 2, -100]), 3)
    with pytest.raises(DataError, match="label -1 is out of range"):
        refuse_out_of_range(np.array([0, -1]), 3)
    with pytest.raises(DataError, match="label 3 is out of range"):
        refuse_out_of_range(torch.tensor([[0, 3]]), 3)


def test_the_chance_level_of_labels_in_other_forms_is_that_of_their_classes() -> None:
    labels = np.repeat(np.eye(2, dtype=np.float32), [30, 70], axis=0)
    assert "class gives 0.7000 (100 labels)" in str(chance_level_reason("top1_accuracy", 0.69, [labels]))
    assert chance_level_reason("top1_accuracy", 0.95, [labels]) is None


IDS = np.array([[1, 2, 3, 4], [4, 3, 2, 1]])


def causal(batch: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Scores that say: the same token again."""
    return [np.eye(5, dtype=np.float32)[batch["ids"]]]


def bidirectional(batch: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    scores = causal(batch)[0]
    return [scores + scores.sum(1, keepdims=True)]


def test_labels_become_the_next_positions_with_nothing_after_the_last() -> None:
    expected = [[2, 3, 4, -100], [3, 2, 1, -100]]
    assert shifted(IDS).tolist() == expected
    assert shifted(torch.from_numpy(IDS)).tolist() == expected


def test_labels_that_repeat_the_input_of_a_causal_model_are_shifted() -> None:
    assert predicts_next_token({"ids": IDS}, IDS, causal)
    padded = IDS.copy()
    padded[1, 3] = -100
    assert predicts_next_token({"ids": IDS, "mask": np.ones_like(IDS)}, padded, causal)


@pytest.mark.parametrize(
    ("labels", "run"),
    [
        (IDS + 1, causal),  # labels of their own
        (IDS, bidirectional),  # an autoencoder of tokens
        (IDS, lambda batch: [causal(batch)[0][:, 0]]),  # one row of scores a sample
        (IDS.astype(np.float32), causal),
        (None, causal),
        (IDS[:, 0], causal),
    ],
)
def test_anything_else_is_not(labels: Any, run: Any) -> None:
    assert not predicts_next_token({"ids": IDS}, labels, run)
