"""A small project with real, trained models: digits as vectors, images and sequences; and one run of each verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

Load = Callable[..., TensorDataset]

NET = """
import torch
from torch import nn
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

def net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))

def load(split):
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    target = torch.tensor(digits.target)
    part = {"train": slice(0, 900), "calibration": slice(900, 1250), "eval": slice(1250, 1797)}[split]
    return TensorDataset(images[part], target[part])
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.py` and `net.pt`: a small CNN, trained on digits in seconds."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.py").write_text(NET)
    scope: dict[str, Callable[..., nn.Module]] = {}
    exec(NET, scope)
    torch.manual_seed(0)
    net = scope["net"]()
    data = scope["load"]("train")
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(12):
        for rows in torch.randperm(len(data)).split(64):
            images, target = data[rows]
            loss = nn.functional.cross_entropy(net(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(net.state_dict(), folder / "net.pt")
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the project, which is the current one."""
    for name in ("net.py", "net.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The evaluation images (547, 1, 8, 8) and their classes."""
    data = load_digits()
    return torch.tensor(data.images[1250:, None] / 16, dtype=torch.float32), torch.tensor(data.target[1250:])
