"""Samples as users have them: without targets, of different lengths, in a list that may hold batches instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from omgoptim.errors import DataError
from omgoptim.models.data import as_batches
from omgoptim.models.raw_batch import Collation, RawBatch, split_target

ROWS = torch.arange(15.0).reshape(5, 3)


class Rows(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Tokens(nn.Module):
    """Takes ids with a mask, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(input_ids)


def batches(loaded: Any, module: nn.Module | None = None, size: int = 2) -> list[RawBatch]:
    return list(as_batches(loaded, size, False, Collation(module)))


def test_a_data_set_without_targets_gives_batches_without_targets() -> None:
    found = batches(Rows([(row, None) for row in ROWS]))
    assert torch.equal(torch.cat([raw.inputs for raw in found]), ROWS)
    assert [raw.target for raw in found] == [None, None, None]


def test_a_target_in_some_samples_only_is_refused() -> None:
    with pytest.raises(DataError, match="others have None"):
        batches(Rows([(ROWS[0], 1), (ROWS[1], None)]))


def test_a_data_sets_own_collate_function_is_used() -> None:
    class Own(Rows):
        def collate_fn(self, samples: list[Any]) -> Any:
            return torch.stack([x for x, _ in samples]) + 100, torch.tensor([y for _, y in samples])

    (raw,) = batches(Own([(ROWS[0], 1), (ROWS[1], 0)]))
    assert torch.equal(raw.inputs, ROWS[:2] + 100)


def test_a_models_own_collate_function_pads_samples_of_different_lengths() -> None:
    class Padding(nn.Embedding):
        def collate_fn(self, samples: list[Any]) -> Any:
            return nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True, padding_value=9), None

    (raw,) = as_batches(Rows([(IDS[0], None), (IDS[1], None)]), 2, False, Collation(Padding(30, 4)))
    assert raw.inputs.tolist() == [[5, 6, 9], [7, 8, 9]]


IDS = [torch.tensor(ids) for ids in ([5, 6], [7, 8, 9], [1, 2], [3, 4, 5])]


def test_samples_of_different_lengths_share_a_batch_with_their_like_where_there_is_no_mask() -> None:
    how = Collation(nn.Embedding(30, 4))
    found = list(as_batches(Rows([(ids, index) for index, ids in enumerate(IDS)]), 2, False, how))
    assert [raw.inputs.tolist() for raw in found] == [[[5, 6], [1, 2]], [[7, 8, 9], [3, 4, 5]]]
    assert [raw.target.tolist() for raw in found] == [[0, 2], [1, 3]]
    assert how.notes == ["samples differ in shape: each batch has samples of one shape"]


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_samples_of_different_lengths_are_padded_where_the_model_takes_a_mask(form: str) -> None:
    samples = [(ids if form == "tensor" else {"input_ids": ids}, ids) for ids in IDS]
    found = batches(Rows(samples), Tokens())
    assert found[0].inputs["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert found[0].inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert found[0].target.tolist() == [[5, 6, -100], [7, 8, 9]]


@pytest.mark.parametrize(
    ("items", "module"),
    [
        ([(row, 1) for row in ROWS], None),
        ([{"x": row, "label": 1} for row in ROWS], None),
        ([(ids, None) for ids in IDS], nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 2))),
        ([torch.ones(1, 8, 8)] * 3, nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())),
    ],
)
def test_a_list_of_samples_is_taken_as_samples_where_ranks_say_so(items: list[Any], module: nn.Module | None) -> None:
    how = Collation(module)
    found = list(as_batches(items, 5, False, how))
    first = found[0].inputs
    first = next(iter(first.values())) if isinstance(first, dict) else first
    before = split_target(items[0]).inputs
    before = next(iter(before.values())) if isinstance(before, dict) else before
    assert first.ndim == before.ndim + 1
    assert how.notes[0].startswith("the data's list contains samples")


@pytest.mark.parametrize(
    "items",
    [
        [(ROWS, torch.zeros(5))],
        [(ROWS, torch.zeros(5)), (ROWS[:2], torch.zeros(2))],
        [(ROWS[:1], 1)],
        [ROWS, ROWS],
    ],
)
def test_a_list_of_batches_stays_one(items: list[Any]) -> None:
    found = batches(items, nn.Linear(3, 2))
    assert [len(raw.inputs) for raw in found] == [len(split_target(item).inputs) for item in items]


class RunningSum(nn.Module):
    """A decoder of tokens that takes one sentence as a batch of words without complaint."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 4), nn.Linear(4, 30)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids).cumsum(1))


def test_entries_that_may_be_batches_or_samples_are_refused_where_the_answers_differ() -> None:
    entries = [(torch.arange(8) + start, torch.arange(8)) for start in range(3)]
    with pytest.raises(DataError, match="could be batches or samples") as error:
        batches(entries, RunningSum())
    assert "TensorDataset" in error.value.fix
    assert [len(raw.inputs) for raw in batches(iter(entries), RunningSum())] == [8, 8, 8]
    assert batches(Rows(entries), RunningSum())[0].inputs.shape == (2, 8)


def test_the_ranks_that_a_program_states_decide() -> None:
    how = Collation(None, [3])
    assert how.are_samples([ROWS, ROWS])
    assert not how.are_samples([ROWS[None], ROWS[None]])


def test_targets_inside_the_inputs_are_found() -> None:
    assert split_target(({"x": 1, "labels": 2},)) == RawBatch({"x": 1}, 2)
    assert split_target(({"x": 1, "labels": 2}, None)) == RawBatch({"x": 1}, 2)
    assert split_target({"inputs": {"x": 1, "z": 3}, "y": 2}) == RawBatch({"x": 1, "z": 3}, 2)
    assert split_target({"inputs": {"x": 1, "target": 2}}) == RawBatch({"x": 1}, 2)
