from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch


def test_the_committed_weights_classify_held_out_digits(example):
    model = example.build()
    rows, labels = example.load("eval").tensors
    with torch.no_grad():
        right = (model(rows).argmax(1) == labels).float().mean().item()
    assert not model.training
    assert right >= 0.95


def test_no_digit_is_in_two_splits(example):
    rows = {split: {x.numpy().tobytes() for x, _ in example.load(split)} for split in example.SPLITS}
    assert set(rows) == {"train", "calibration", "eval"}
    assert sum(len(some) for some in rows.values()) == 1797
    assert all(first.isdisjoint(second) for first, second in combinations(rows.values(), 2))


@pytest.mark.parametrize("split", ["train", "calibration", "eval"])
def test_a_split_is_the_same_every_time(example, split):
    torch.manual_seed(123)
    first = example.load(split).tensors
    torch.manual_seed(456)
    again = example.load(split).tensors
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_the_order_of_the_rows_matters_to_the_network(example):
    model = example.build()
    rows, labels = example.load("eval").tensors
    with torch.no_grad():
        right = (model(rows.flip(1)).argmax(1) == labels).float().mean().item()
    assert right < 0.6


def test_the_weights_are_small_enough_to_be_committed(example):
    assert example.WEIGHTS.stat().st_size < 500_000


def test_the_file_is_shorter_than_60_lines(example):
    assert len(Path(example.__file__).read_text().splitlines()) < 60
