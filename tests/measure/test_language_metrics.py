"""Log-likelihood and KL, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from omgoptim.errors import DataError
from omgoptim.measure.builtin_metrics import builtin_metric, negative_kl, token_log_likelihoods

SCORES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([[0, 1, 2, -100], [3, 4, -100, -100], [1, 1, 1, -100]])


def batches(scores: torch.Tensor) -> list[list[np.ndarray]]:
    return [[scores[:2].numpy()], [scores[2:].numpy()]]


SPLIT = [TARGETS[:2].numpy(), TARGETS[2:].numpy()]


def test_the_mean_log_likelihood_is_minus_torchs_cross_entropy() -> None:
    expected = -F.cross_entropy(SCORES.flatten(0, 1), TARGETS.flatten()).item()
    assert token_log_likelihoods(batches(SCORES), SPLIT, []).mean() == pytest.approx(expected, rel=1e-6)
    probabilities = batches(SCORES.softmax(-1))
    assert token_log_likelihoods(probabilities, SPLIT, []).mean() == pytest.approx(expected, rel=1e-4)


def test_kl_is_torchs_from_the_original_and_zero_for_itself() -> None:
    rows = F.kl_div(OTHER.log_softmax(-1), SCORES.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert negative_kl(batches(OTHER), [None, None], batches(SCORES)) == pytest.approx(-rows.mean(1).numpy(), rel=1e-4)
    counted = TARGETS != -100
    expected = (rows * counted).sum(1) / counted.sum(1)
    assert negative_kl(batches(OTHER), SPLIT, batches(SCORES)) == pytest.approx(-expected.numpy(), rel=1e-4)
    assert negative_kl(batches(SCORES), SPLIT, batches(SCORES)).max() == 0


def test_both_are_metrics_by_name_and_say_what_they_are() -> None:
    perplexity = builtin_metric("perplexity", batches(SCORES), SPLIT)
    kl = builtin_metric("kl", batches(SCORES), [None])
    assert perplexity is not None
    assert perplexity.name == "log_likelihood_per_token"
    assert not perplexity.agreement
    assert kl is not None
    assert kl.name == "negative_kl"
    assert kl.agreement


def test_perplexity_without_targets_for_each_row_is_refused() -> None:
    with pytest.raises(DataError, match="needs targets"):
        builtin_metric("perplexity", batches(SCORES), [None])
    with pytest.raises(DataError, match="does not fit"):
        token_log_likelihoods(batches(SCORES), [np.zeros(2, int), np.zeros(1, int)], [])
