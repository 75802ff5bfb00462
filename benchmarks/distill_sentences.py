"""MiniLM and English sentences, for the part of benchmarks/distill.py that learns from a teacher's answers alone.

Learnt from: docstrings of Python's standard library, and some of the sentences of its documentation. The others of
those choose and are scored. The scored ones carry the teacher's embeddings, by which `ranking` judges.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from minilm import MODEL_DIR, SentenceEmbedding, sentences
from torch import Tensor, nn
from transformers import AutoTokenizer

SPLITS = {"train": slice(0, 1100), "calibration": slice(1100, 1350), "eval": slice(1350, 1750)}
"""Of the documentation's sentences, as benchmarks/factorize.py has them."""

DOCSTRINGS = 10_000
"""Sentences of docstrings, at most."""

LENGTH, BATCH = 64, 64

Tokens = dict[str, Tensor]


def teacher() -> nn.Module:
    """MiniLM without dropout, which costs a student far more here than it brings; its embeddings are not trained: a
    student that keeps them has the teacher's already, and they are two thirds of what an optimizer would have to move.
    """
    net = SentenceEmbedding()
    net.encoder.embeddings.requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return net.eval()


def docstrings() -> list[str]:
    """English sentences of 40 to 200 characters, in a shuffled order that is always the same."""
    found: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib"} & set(path.relative_to(root).parts):
            continue
        for text in _documentation(path):
            paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
            split = (each for part in paragraphs for each in re.split(r"(?<=[.!?]) +(?=[A-Z])", part))
            found.update(each for each in split if re.fullmatch(r"[A-Z][^|=>{}\[\]~^\\]{40,200}[.!?]", each))
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def _documentation(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def tokenized(texts: list[str]) -> list[Tokens]:
    """Batches of sentences of similar length, each as long as its longest: half of the work of equal lengths."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    counted = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    texts = [text for _, text in sorted(zip(counted, texts, strict=True), key=lambda pair: len(pair[0]))]
    options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    batches = (tokenizer(texts[start : start + BATCH], **options) for start in range(0, len(texts), BATCH))
    return [{name: tokens[name] for name in ("input_ids", "attention_mask")} for tokens in batches]


class Shuffled:
    """The same batches every time, in an order drawn from torch's random state."""

    def __init__(self, batches: list[Tokens]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tokens]:
        for index in torch.randperm(len(self.batches)).tolist():
            yield self.batches[index]


def load(split: str) -> Any:
    own = sentences()
    if split == "train":
        known = set(own)
        texts = own[SPLITS[split]] + [text for text in docstrings() if text not in known][:DOCSTRINGS]
        return Shuffled(tokenized(texts))
    batches = tokenized(own[SPLITS[split]])
    net = teacher()
    with torch.inference_mode():
        return [(batch, net(**batch)) for batch in batches]


def ranking(outputs: Tensor, targets: Tensor) -> float:
    """Spearman's rank correlation, over all pairs of sentences, between similarities of outputs and of targets.

    Args:
        outputs, targets: embeddings (N, D) of length 1.
    """
    above = np.triu_indices(len(outputs), 1)
    ranks = [
        np.argsort(np.argsort((each @ each.T).numpy()[above])) for each in map(torch.as_tensor, (outputs, targets))
    ]
    return float(np.corrcoef(*ranks)[0, 1])
