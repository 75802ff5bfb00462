"""A server for all tests of this folder, and one for each test that changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ssh_server import Server, running_server

from omgoptim.measure.target.client import Target
from omgoptim.measure.target.connection import CONFIG_VARIABLE
from omgoptim.requests.base import TargetAddress

Connect = Callable[..., Target]


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def server(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, with ssh configured for it; nothing may be left running there."""
    monkeypatch.setenv(CONFIG_VARIABLE, str(shared_server.config))
    yield shared_server
    assert shared_server.gone()


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the test may change."""
    with running_server(tmp_path_factory.mktemp("sshd")) as server:
        monkeypatch.setenv(CONFIG_VARIABLE, str(server.config))
        yield server


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """`connect(server, …)`: a target; it is left after the test."""
    with ExitStack() as stack:

        def make(server: Server, holder: str = "run-1", reconnect_s: float = 20.0) -> Target:
            said: list[str] = []
            address, kept = TargetAddress.parse(server.url), tmp_path / "measured.jsonl"
            target = Target(address, "onnxruntime", holder, tmp_path, said.append, kept)
            target.reconnect_s = reconnect_s
            return stack.enter_context(target)

        yield make
