"""One thread, so that the same seed gives the same bits however many cores there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omgoptim.models.security.path_policy import PathPolicy


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def policy(tmp_path: Path) -> PathPolicy:
    return PathPolicy.of(tmp_path, [])
