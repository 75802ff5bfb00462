"""Labels that repeat the input are targets of the next token, for a model that sees none of the later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omgoptim.models.labels import predicts_next_token, shifted

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
