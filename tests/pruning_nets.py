"""Small networks of every kind that structured pruning meets, written as users write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """A stem, one block with an addition, a head: 3x3 convolutions at 8x8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.conv2(torch.relu(self.conv1(x)))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Concatenation, a grouped convolution, group norms of many and of few groups, and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 1)
        self.right = nn.Conv2d(3, 6, 1)
        self.joined = nn.Conv2d(14, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(12, 16, 2, 2)
        self.many = nn.GroupNorm(8, 16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.few = nn.GroupNorm(2, 8)
        self.prelu = nn.PReLU(8)
        self.hidden = nn.Linear(8 * 16, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.joined(torch.cat([self.left(x), self.right(x).relu()], 1))
        x = self.many(self.up(self.grouped(x)))
        x = functional.avg_pool2d(self.prelu(self.few(self.narrow(x))), 4)
        return self.out(torch.relu(self.hidden(x.flatten(1))))


class Inverted(nn.Module):
    """A MobileNet's inverted residual: widen, depthwise, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.adds = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return x + made if self.adds else made


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        Inverted(8, 8, 1),
        Inverted(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class FusedAttention(nn.Module):
    """One Linear for queries, keys and values, as timm writes it; `fixed` reshapes to the model's width."""

    def __init__(self, width: int, heads: int, fixed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fixed = heads, width // heads, fixed
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(batch, length, width) if self.fixed else x.flatten(2))


class SplitAttention(nn.Module):
    """A Linear each for queries, keys and values; fewer heads of keys and values than of queries if asked for."""

    def __init__(self, width: int, heads: int, key_heads: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = heads, key_heads or heads, width // heads
        self.wo = nn.Linear(width, width)
        self.wv = nn.Linear(width, self.n_kv_heads * self.head_dim)
        self.wq = nn.Linear(width, width)
        self.wk = nn.Linear(width, self.n_kv_heads * self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.n_heads, self.head_dim).transpose(1, 2)
        k, v = (
            layer(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2) for layer in (self.wk, self.wv)
        )
        times = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return self.wo(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Patches of 4x4 of a 16x16 image, a class token, one block for each attention."""

    def __init__(self, width: int, *attentions: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, attention) for attention in attentions))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class HardCoded(nn.Module):
    """A reshape to a number that only holds at full width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(x.view(-1, 512))
