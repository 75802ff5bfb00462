"""Tests of what a comparison says of where its two artifacts come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.manifest import Manifest
from omgoptim.models.samples import Samples
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.compare import common_lineage, comparable_samples, lineage_sentence
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.prepare import prepare
from omgoptim.requests import ModelRequest, parse
from omgoptim.runtimes.signature import Signature


def made_by(*lineage: str) -> Manifest:
    return Manifest("onnxruntime", "float32", Signature((), None), lineage=lineage)


@pytest.mark.parametrize(
    ("a", "b", "lineage"),
    [
        (("a",), ("b",), []),
        (("a",), ("a", "b"), ["a", "b"]),
        (("a", "b"), ("a",), ["a"]),
        (("first", "a"), ("first", "b"), ["first", "b"]),
        ((), ("b",), []),
    ],
)
def test_a_lineage_is_only_what_the_manifests_share(a: tuple[str, ...], b: tuple[str, ...], lineage: list[str]) -> None:
    assert common_lineage(made_by(*a), made_by(*b)) == lineage


def test_two_models_without_a_common_run_are_called_separate_unless_both_came_from_one_source() -> None:
    one, other = {"model": "net.py:build", "checkpoint": None}, {"model": "net.py:small", "checkpoint": None}
    assert "no common run" in lineage_sentence(one, other)
    assert "no common run" in lineage_sentence(one, one | {"checkpoint": "weights.pt"})
    assert "no common run" in lineage_sentence({}, {})
    assert lineage_sentence(one, one) == " Both were made from net.py:build."


def test_nothing_is_said_of_models_that_only_their_process_knew() -> None:
    assert lineage_sentence({"model": "(live module)"}, {"model": "(live module)"}) == ""


class Recalled(nn.Module):
    """Scores (B, T, 9) for each token; of tokens before it only, or of all of its line."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embedding, self.head = nn.Embedding(9, 16), nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> Tensor:
        lines = self.embedding(ids)
        return self.head(lines.cumsum(1) if self.causal else lines + lines.mean(1, keepdim=True))


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


def read_twice(
    folder: Path, module: nn.Module, batch: Tensor, target: Tensor | None
) -> tuple[Samples, list[str], bool]:
    """The samples as a comparison of a model's artifact with itself takes them."""
    request = parse("profile", {"model": "(live module)", "data": "(live data)", "threads": 1})
    assert isinstance(request, ModelRequest)
    context = RunContext(folder, "run", folder, sys.executable, "test", lambda _stage, _done: None)
    live = Live(module=module.eval(), data=lambda split: [(batch, target)])
    loaded = prepare(request, context, live)
    arrays: list[Any] = [None if target is None else target.numpy()]
    name = loaded.signature.input_names[0]
    samples = Samples([{name: batch.numpy()}], arrays)
    return comparable_samples([loaded.baseline, loaded.baseline], samples, 1, PathPolicy.of(folder, [], []))


@pytest.mark.parametrize("causal", [True, False])
def test_labels_that_repeat_the_inputs_are_shifted_only_for_a_model_that_sees_no_later_token(
    causal: bool, tmp_path: Path
) -> None:
    ids = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(0))
    samples, notes, free_batch = read_twice(tmp_path, Recalled(causal), ids, ids)
    expected = torch.cat([ids[:, 1:], torch.full((6, 1), -100)], 1) if causal else ids
    assert (samples.targets[0] == expected.numpy()).all()
    assert any("next token" in note for note in notes) is causal
    assert free_batch


def test_a_comparison_of_models_whose_answer_depends_on_the_batch_takes_samples_one_by_one(tmp_path: Path) -> None:
    samples, notes, free_batch = read_twice(tmp_path, Centred(), torch.randn(6, 4), None)
    assert len(samples.batches) == 6
    assert not free_batch
    assert len([note for note in notes if "depend on the other samples of its batch" in note]) == 1
