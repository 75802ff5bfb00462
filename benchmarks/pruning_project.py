"""What the whole commands of benchmarks/prune_speed.py are given: a trained R8 by its weights, MNIST-5k in splits."""

from __future__ import annotations

import torch
from pruning_nets import R8, digits
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

LEARNT = 1600
"""Of the 2000 training images, those that are trained on; the other 400 choose. The 3000 are only scored."""


def build(weights: str, width: int = 24) -> nn.Module:
    net = R8(width)
    net.load_state_dict(load_file(weights))
    return net.eval()


def load(split: str) -> TensorDataset:
    data = digits()
    if split == "eval":
        return TensorDataset(data.test_images, data.test_labels)
    rows = torch.arange(LEARNT) if split == "train" else torch.arange(LEARNT, len(data.train_labels))
    return TensorDataset(data.train_images[rows], data.train_labels[rows])
