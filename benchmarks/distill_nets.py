"""Teachers and students of benchmarks/distill.py, as a user would give them, and the training that teachers get.

R8(24) of pruning_nets.py reads images, and its student is of depth-separable convolutions; a GRU reads series, and its
student is a smaller one. MiniLM is in distill_sentences.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pruning_nets import R8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from omgoptim.blocks import DepthSeparableConv

BATCH, WEIGHT_DECAY = 64, 0.01


class Separable(nn.Module):
    """A depth-separable convolution with its normalization and ReLU, and a shortcut where it keeps the shape."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv = DepthSeparableConv(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.keeps = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(x + y if self.keeps else y)


class SmallReader(nn.Module):
    """Images (N, 1, 28, 28) to scores of 10 classes in nine small convolutions.

    5,122 parameters, those of R8(4), with 12, 24 and 40 channels; 8,134 with 16, 32 and 52.
    """

    def __init__(self, stem: int = 12, middle: int = 24, last: int = 40) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        shapes = (stem, middle, 2), (middle, middle, 1), (middle, last, 2), (last, last, 1)
        self.blocks = nn.Sequential(*(Separable(*shape) for shape in shapes))
        self.head = nn.Linear(last, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


class SeriesReader(nn.Module):
    """A GRU over (N, length, 6), the mean of its states, and scores of 7 classes: 30,631 parameters at 96 units."""

    def __init__(self, hidden: int):
        super().__init__()
        self.gru = nn.GRU(6, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 7)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        scores: Tensor = self.head(states.mean(1))
        return scores


def images_teacher(weights: str = "") -> nn.Module:
    return _with(R8(24), weights)


def images_student(seed: int) -> nn.Module:
    return _drawn(SmallReader, seed)


def wider_student(seed: int) -> nn.Module:
    return _drawn(lambda: SmallReader(16, 32, 52), seed)


def series_teacher(weights: str = "") -> nn.Module:
    return _with(SeriesReader(96), weights)


def series_student(seed: int) -> nn.Module:
    return _drawn(lambda: SeriesReader(26), seed)


def _with(net: nn.Module, weights: str) -> nn.Module:
    if weights:
        net.load_state_dict(load_file(weights))
    return net.eval()


def _drawn(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A net with weights drawn from a seed; the global random state is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def taught(
    make: Callable[[], nn.Module], data: Dataset[Any], name: str, seed: int, cache: Path, epochs: int, peak: float
) -> Path:
    """The weights of a teacher trained from its seed, or of an earlier run with this torch.

    AdamW under a one-cycle schedule, cross-entropy; the weights after the last epoch. `data` draws its augmentation
    from the same seed.
    """
    kept = cache / f"{name}-seed{seed}-epochs{epochs}-torch{torch.__version__}.safetensors"
    if kept.exists():
        return kept
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make().train()
        batches = DataLoader(data, BATCH, shuffle=True, drop_last=True)
        optimizer = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * len(batches))
        for inputs, labels in (batch for _ in range(epochs) for batch in batches):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), labels).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    save_file(net.state_dict(), partial)
    partial.replace(kept)
    return kept
