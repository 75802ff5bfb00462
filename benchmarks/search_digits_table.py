"""Train every network of a small space on scikit-learn's digits, with three seeds each: a table to try searches on.

36 networks: channels of two stages, layers of the second, and the kernel. Quality is the accuracy on 600 digits that
no network was trained on. The tests of the proposal rule read the result, `tests/search/digits_table.json`.

    python benchmarks/search_digits_table.py [--epochs 6]
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from record import console
from sklearn.datasets import load_digits
from torch import Tensor, nn

from omgoptim.measure.macs import count_macs

TABLE = Path(__file__).parent.parent / "tests" / "search" / "digits_table.json"
KNOBS = {"first": (4, 8, 16), "second": (8, 16, 32), "layers": (1, 2), "kernel": (3, 5)}
SEEDS = (0, 1, 2)
TRAINING = 900
"""Digits that are trained on, from the first; those between them and the last 600 are not used."""


def network(first: int, second: int, layers: int, kernel: int) -> nn.Module:
    """Two stages of convolutions on 8x8 digits, and a linear head."""
    channels = [(1, first, 1), (first, second, 2), *[(second, second, 1)] * (layers - 1)]
    convolutions: list[nn.Module] = []
    for before, after, stride in channels:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        convolutions += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 10))


def digits() -> tuple[Tensor, Tensor]:
    """Images, shape [1797, 1, 8, 8], and labels, in one shuffled order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order], torch.tensor(labels)[order])


def accuracy(model: nn.Module, seed: int, epochs: int) -> float:
    """Train a new network and return its accuracy on the last 600 digits."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    batches = -(-TRAINING // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs * batches)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(TRAINING, generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        return float((model(x[-600:]).argmax(dim=1) == y[-600:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    networks = []
    for values in itertools.product(*KNOBS.values()):
        configuration = dict(zip(KNOBS, values, strict=True))
        found = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = network(**configuration)
            found.append(round(accuracy(model, seed, epochs), 5))
        macs = count_macs(model, (torch.zeros(1, 1, 8, 8),), {}).macs
        networks.append({"configuration": configuration, "macs": macs, "accuracies": found})
        console.print(configuration, macs, found)
    record = {"made_by": "benchmarks/search_digits_table.py", "epochs": epochs, "knobs": KNOBS, "networks": networks}
    TABLE.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"[dim]{TABLE}[/]")


if __name__ == "__main__":
    main()
