from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def model(example):
    return example.build()


@pytest.fixture(scope="module")
def tokenizer(example):
    return example.AutoTokenizer.from_pretrained(example.MODEL_DIR)


def embed(model, tokens):
    with torch.no_grad():
        return model(tokens["input_ids"], tokens["attention_mask"])


def test_a_paraphrase_is_nearer_than_another_subject(model, tokenizer):
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The parliament passed a new tax law."]
    first, paraphrase, other = embed(model, tokenizer(texts, padding=True, return_tensors="pt"))
    assert first @ paraphrase > 0.5
    assert first @ other < 0.2


def test_embeddings_have_length_one_and_ignore_padding(model, tokenizer):
    short = embed(model, tokenizer(["Mutable sequences can be changed."], return_tensors="pt"))
    options = {"padding": "max_length", "max_length": 128, "return_tensors": "pt"}
    padded = embed(model, tokenizer(["Mutable sequences can be changed."], **options))
    assert short.shape == (1, 384)
    assert not model.training
    torch.testing.assert_close(short.norm(dim=-1), torch.ones(1))
    torch.testing.assert_close(short, padded, atol=1e-5, rtol=0)


def test_no_sentence_is_in_two_splits(example):
    rows = {
        split: {ids.numpy().tobytes() for batch in example.load(split) for ids in batch["input_ids"]}
        for split in ("train", "calibration", "eval")
    }
    assert {split: len(some) for split, some in rows.items()} == {"train": 300, "calibration": 300, "eval": 400}
    assert all(first.isdisjoint(second) for first, second in combinations(rows.values(), 2))


def test_batches_are_dicts_of_128_tokens_and_the_same_every_time(example):
    for first, again in zip(example.load("eval"), example.load("eval"), strict=True):
        assert list(first) == ["input_ids", "attention_mask"]
        assert all(tensor.shape[1] == 128 and tensor.dtype == torch.int64 for tensor in first.values())
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_file_is_shorter_than_60_lines(example):
    assert len(Path(example.__file__).read_text().splitlines()) < 60
