"""A project folder of a user's files, and a process that forgets them afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omgoptim.models.security.path_policy import PathPolicy

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(3, width)
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        return self.out(torch.relu(self.fc(x)))

def build(width=4):
    return Net(width)

torch.manual_seed(0)
net = Net()
number = 3
"""
"""A model file in a user's hand: a class, a function and an instance."""


@pytest.fixture(autouse=True)
def _forget_user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove modules that a test imported from its project: names and import paths repeat between tests.

    A project is known by pytest's own folder, which `--basetemp` may put anywhere.
    """
    modules, path, projects = set(sys.modules), list(sys.path), tmp_path_factory.getbasetemp().resolve()
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if name.startswith("_omgoptim_user_") or (file and Path(file).resolve().is_relative_to(projects)):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def policy(project: Path) -> PathPolicy:
    return PathPolicy.of(project, [])


@pytest.fixture
def write(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """`write(name, text)`: a file of the project."""
    monkeypatch.delitem(sys.modules, "net", raising=False)  # of another test's project

    def call(name: str, text: str = NET) -> Path:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return call
