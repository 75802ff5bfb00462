"""A residual CNN on scikit-learn's handwritten digits. `python examples/digits_cnn.py --train` trains it again."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WEIGHTS = Path(__file__).with_suffix(".safetensors")
SPLITS = {"train": slice(0, 900), "calibration": slice(900, 1197), "eval": slice(1197, 1797)}


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build(trained: bool = True) -> nn.Module:
    stem = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
    blocks = Block(24, 32, 2), Block(32, 64, 2), Block(64, 96, 2)
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))
    if trained:
        model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def load(split: str) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x = nn.functional.interpolate(x, scale_factor=4)  # each of the 8x8 pixels becomes a square of 4x4
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[SPLITS[split]]
    return TensorDataset(x[chosen], torch.tensor(labels)[chosen])


def train(epochs: int = 15) -> nn.Module:
    torch.manual_seed(0)
    model, batches = build(trained=False).train(), DataLoader(load("train"), batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * len(batches))
    for x, y in (batch for _ in range(epochs) for batch in batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__" and "--train" in sys.argv:
    save_file(train().state_dict(), WEIGHTS)
