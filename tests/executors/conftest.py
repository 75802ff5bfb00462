from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers import the tasks of these tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
