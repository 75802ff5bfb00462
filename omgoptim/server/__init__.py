"""MCP server: parse, submit, wait, return. No logic and no heavy imports: it must start in about a second.

`main` serves over stdio, `serve_http` over HTTP. Both protocol eras (2025-11-25 and 2026-07-28) are served.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import anyio
from mcp.server.stdio import stdio_server

from omgoptim.server.handlers import build_server
from omgoptim.server.unreadable import AnsweredStream


def main() -> None:
    """Entry point of `omgoptim-mcp`: serve over stdio until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt cannot wake the thread that reads standard input
    anyio.run(_serve_stdio)
    _leave()


def serve_http(port: int) -> None:
    """Serve over HTTP on the loopback interface, with a bearer token."""
    from omgoptim.server.http import serve

    serve(build_server(), port)


async def _serve_stdio() -> None:
    server = build_server()
    async with stdio_server() as (incoming, outgoing):
        readable = AnsweredStream(incoming, outgoing)
        await server.run(readable, outgoing, server.create_initialization_options())


def _leave() -> None:
    """Exit at once: a thread that still reads a run's state must not hold the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if threading.active_count() > 1:
        os._exit(0)
