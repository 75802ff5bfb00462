"""A small vision transformer on MNIST-5k, as a user's project would hold it: one case of benchmarks/quantize.py."""

from pathlib import Path

import torch
from pruning_nets import digits, train
from quantize_resnet import load  # the same images and splits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["build", "load"]

WEIGHTS = Path(__file__).with_suffix(".safetensors")
WIDTH, HEADS, DEPTH, PATCH, TOKENS = 96, 4, 4, 7, 16


class Attention(nn.Module):
    """Self-attention over (N, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Layer(nn.Module):
    """A transformer layer that normalizes first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.feed(self.norm2(x))
        return y


class ViT(nn.Module):
    """Images (N, 1, 28, 28) in 16 patches to scores of 10 classes: 455 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        scores: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return scores


def build() -> nn.Module:
    net = ViT()
    if WEIGHTS.exists():
        net.load_state_dict(load_file(WEIGHTS))
    else:
        torch.manual_seed(0)
        save_file(train(ViT(), digits(), epochs=40, peak=2e-3, seed=0).state_dict(), WEIGHTS)
        return build()
    return net.eval()
