"""Makes `payloads` importable from the tests of this folder, and forgets what a test imported from its project."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _forget_user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    modules, path, projects = set(sys.modules), list(sys.path), tmp_path_factory.getbasetemp().resolve()
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if name.startswith("_omgoptim_user_") or (file and Path(file).resolve().is_relative_to(projects)):
            del sys.modules[name]
