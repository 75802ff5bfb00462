"""Addresses of Ray, and a probe for them.

`ray.init` on an address where nothing answers blocks for minutes: a plain TCP connection says so in seconds.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omgoptim.errors import SetupError, argument
from omgoptim.requests.training import refuse_ray_client

PROBE_S = 2.0
"""Seconds that a head may take to accept a connection."""

ADDRESS = "RAY_ADDRESS"

MODE = "RAY_AUTH_MODE"
"""Environment variable without which Ray takes no notice of a token."""


def cluster_address() -> str | None:
    """Return the address in RAY_ADDRESS; None for a local Ray.

    Raises:
        RequestError: it is of the Ray Client.
        SetupError: nothing answers there.
    """
    named = os.environ.get(ADDRESS, "").strip()
    if not named or named == "local":
        return None
    refuse_ray_client(named, f"{ADDRESS}={named}")
    if named == "auto":
        current = Path("/tmp/ray/ray_current_cluster")  # where `ray start` writes it
        named = current.read_text(encoding="utf-8").strip() if current.is_file() else ""
        if not named:
            raise SetupError(
                f"{ADDRESS} is auto, and no Ray runs on this machine",
                f"there is no {current}",
                f"start it (`ray start --head`), or unset {ADDRESS} for a local Ray",
            )
    host, _, port = named.rpartition(":")
    if not host or not port.isdecimal():
        raise SetupError(f"{ADDRESS}={named} is not an address", "it is host:port", "for instance head:6379")
    probe(host.strip("[]"), int(port), f"{ADDRESS}={named}")
    return named


def probe_head(url: str) -> None:
    """Check that a head of Ray jobs accepts connections.

    Raises:
        SetupError: nothing answers there.
    """
    parts = urlsplit(url)
    probe(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), argument("on", url))


def probe(host: str, port: int, given: str) -> None:
    """Connect, and hang up.

    Raises:
        SetupError: nothing answers in time.
    """
    try:
        socket.create_connection((host, port), PROBE_S).close()
    except OSError as error:
        raise SetupError(
            f"no Ray head answers: {given}",
            f"{host}:{port}: {error.strerror or error}",
            f"start it (`ray start --head`), or give {argument('on', 'ray')} without {ADDRESS} for a local Ray",
        ) from None


def ray_library(part: str = "") -> Any:
    """Import Ray, or a part of it such as `train.torch`.

    Raises:
        SetupError: it is not installed.
    """
    try:
        return importlib.import_module(f"ray.{part}" if part else "ray")
    except ImportError as error:
        raise SetupError(
            "running on Ray needs the package ray",
            f"{str(error).splitlines()[0]} ({sys.executable})",
            "pip install 'omgoptim[ray]'",
        ) from error


@contextmanager
def token_mode() -> Iterator[None]:
    """Let Ray and the processes that it starts meanwhile authenticate by RAY_AUTH_TOKEN, where one is given."""
    given = bool(os.environ.get("RAY_AUTH_TOKEN")) and MODE not in os.environ
    if given:
        os.environ[MODE] = "token"
    read_again()
    try:
        yield
    finally:
        if given:
            os.environ.pop(MODE, None)
        read_again()


def read_again() -> None:
    """Make Ray read mode and token from the environment again; it keeps those that it was imported with."""
    with suppress(ImportError, AttributeError):
        compiled = importlib.import_module("ray._raylet")
        compiled.Config.initialize("")
        compiled.AuthenticationTokenLoader.instance().reset_cache()
