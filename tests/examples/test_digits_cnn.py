from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch


def test_the_committed_weights_classify_held_out_digits(example):
    model = example.build()
    images, labels = example.load("eval").tensors
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    assert not model.training
    assert right >= 0.97


def test_no_image_is_in_two_splits(example):
    rows = {split: {x.numpy().tobytes() for x, _ in example.load(split)} for split in example.SPLITS}
    assert set(rows) == {"train", "calibration", "eval"}
    assert sum(len(some) for some in rows.values()) == 1797
    assert all(first.isdisjoint(second) for first, second in combinations(rows.values(), 2))


def test_every_digit_occurs_in_every_split(example):
    assert all(set(example.load(split).tensors[1].tolist()) == set(range(10)) for split in example.SPLITS)


@pytest.mark.parametrize("split", ["train", "calibration", "eval"])
def test_a_split_is_the_same_every_time(example, split):
    torch.manual_seed(123)
    first = example.load(split).tensors
    torch.manual_seed(456)
    again = example.load(split).tensors
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_an_image_is_its_8x8_digit_with_every_pixel_four_times_as_wide_and_high(example):
    image = example.load("eval").tensors[0][0, 0]
    small = image[::4, ::4]
    assert image.shape == (32, 32)
    assert torch.equal(image, small.repeat_interleave(4, 0).repeat_interleave(4, 1))
    assert 0 <= small.min() < small.max() <= 1


def test_training_gives_the_same_weights_twice(example, monkeypatch):
    few = torch.utils.data.TensorDataset(*(tensor[:64] for tensor in example.load("train").tensors))
    monkeypatch.setattr(example, "load", lambda split: few)
    first, again = (example.train(epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_file_is_shorter_than_60_lines(example):
    assert len(Path(example.__file__).read_text().splitlines()) < 60
