"""An LSTM that reads scikit-learn's digits row by row. `python examples/lstm.py --train` trains it again."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WEIGHTS = Path(__file__).with_suffix(".safetensors")
SPLITS = {"train": slice(0, 900), "calibration": slice(900, 1197), "eval": slice(1197, 1797)}


class RowReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.lstm = nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(torch.relu(self.embed(rows)))
        return self.head(states[:, -1])


def build() -> nn.Module:
    model = RowReader()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def load(split: str) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    rows = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 8, 8)  # 8 steps of 8 pixels
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[SPLITS[split]]
    return TensorDataset(rows[chosen], torch.tensor(labels)[chosen])


def train(epochs: int = 40) -> nn.Module:
    torch.manual_seed(0)
    model, batches = RowReader(), DataLoader(load("train"), batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for x, y in (batch for _ in range(epochs) for batch in batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


if __name__ == "__main__" and "--train" in sys.argv:
    save_file(train().state_dict(), WEIGHTS)
