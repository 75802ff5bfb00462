"""A model whose work is a number of equal blocks: two more than 40 are 5 % more work, and nothing else differs."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 384


class Blocks(nn.Module):
    """`blocks` times a Linear and a ReLU on (N, WIDTH)."""

    def __init__(self, blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*(layer for _ in range(blocks) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.blocks(x)
        return y


def build(blocks: int = 40) -> nn.Module:
    torch.manual_seed(0)
    return Blocks(blocks).eval()
