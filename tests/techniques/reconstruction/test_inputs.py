"""Padded sequences of several lengths as one batch: which length, and what becomes of the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.forward import NamedBatch
from omgoptim.models.samples import Samples
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.reconstruction import inputs as batch_module
from omgoptim.techniques.reconstruction.inputs import one_batch, pad_to_one_length
from omgoptim.techniques.registry import ModuleRun


def padded(*real: int, length: int) -> NamedBatch:
    """Sequences of so many real positions: ids that are the position + 1, two features each, and the mask."""
    mask = (np.arange(length) < np.array(real)[:, None]).astype(np.int64)
    ids = mask * np.arange(1, length + 1)
    return {"ids": ids, "features": np.stack([ids, -ids], 2).astype(np.float32), "attention_mask": mask}


def all_fit(_length: int) -> int:
    return 1000


def test_shorter_batches_are_padded_behind_their_end() -> None:
    short, long = pad_to_one_length([padded(2, 3, length=3), padded(5, length=5)], all_fit)
    assert short["ids"].tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 0, 0]]
    assert short["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert short["features"].shape == (2, 5, 2)
    assert np.array_equal(long["features"], padded(5, length=5)["features"])


def test_one_long_batch_does_not_crowd_out_the_others() -> None:
    batches = [padded(*[4] * 10, length=4), padded(100, length=100), padded(*[4] * 10, length=4)]
    cut = pad_to_one_length(batches, lambda length: max(1, 100 // length))  # 21 samples of length 4, or one of 100
    assert [batch["ids"].shape for batch in cut] == [(10, 4), (1, 4), (10, 4)]
    assert cut[1]["attention_mask"].tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    "batches",
    [
        [{"ids": np.ones((2, 3))}, {"ids": np.ones((2, 5))}],  # no mask
        [padded(2, length=4), padded(3, length=4)],  # one length
        [{"mask": np.ones((1, n)), "x": np.ones((1, 7, n))} for n in (3, 5)],  # the sequence on another axis
        [{"mask": np.full((1, n), 0.5), "x": np.ones((1, n))} for n in (3, 5)],  # weights
    ],
)
def test_what_cannot_be_masked_stays_as_it_is(batches: list[NamedBatch]) -> None:
    assert pad_to_one_length(batches, all_fit) is batches


class Masked(nn.Module):
    """A Linear on each position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 6)

    def forward(self, features: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(features) * attention_mask[..., None]


@pytest.mark.parametrize(("most", "samples"), [(2**27, 5), (6 * 8 * 4, 4)])
def test_layers_are_fitted_on_every_real_position_that_memory_allows(
    tmp_path, monkeypatch: pytest.MonkeyPatch, most: int, samples: int
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(batch_module, "MAX_ACTIVATIONS", most)  # 192: outputs of 4 samples of 8 positions
    batches = [padded(2, 3, length=3), padded(8, 7, 6, length=8)]
    batches = [{name: batch[name] for name in ("features", "attention_mask")} for batch in batches]
    inputs = (
        InputTensor("features", "float32", (2, 3, 2), False),
        InputTensor("attention_mask", "int64", (2, 3), False),
    )
    run = ModuleRun(
        Signature(inputs, "tensor"), Samples(batches, [None, None]), lambda *_: torch.zeros(()), Masked(), tmp_path
    )
    features, mask = one_batch(Masked(), run).args
    assert features.shape == (samples, 8, 2)
    assert mask.sum(1).tolist() == [2, 3, 8, 7, 6][:samples]
