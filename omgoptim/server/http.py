"""The server over HTTP: on the loopback interface only, with a bearer token, Host and Origin checked."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import sys
from typing import Any

import uvicorn
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.lowlevel import Server
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.applications import Starlette

from omgoptim.errors import SetupError

HOST = "127.0.0.1"
_SCOPE = "use"


class OneToken:
    """Verifier that accepts only the server's bearer token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def verify_token(self, token: str) -> AccessToken | None:
        """Accept the one token of this server."""
        if not hmac.compare_digest(token.encode(), self._token):
            return None
        return AccessToken(token=token, client_id="local", scopes=[_SCOPE])


def serve(server: Server[Any], port: int) -> None:
    """Serve until interrupted. With port 0, any free port is used. Address and token are printed on standard error.

    Raises:
        SetupError: the port is taken.
    """
    listener = _listen(port)
    port = listener.getsockname()[1]
    token = os.environ.get("OMGOPTIM_TOKEN") or ""
    shown = "the one in $OMGOPTIM_TOKEN" if token else (token := secrets.token_urlsafe(32))
    sys.stderr.write(f"omgoptim serves MCP at http://{HOST}:{port}/mcp\nBearer token: {shown}\n")
    sys.stderr.flush()
    config = uvicorn.Config(application(server, port, token), log_level="warning", log_config=None, lifespan="on")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")


def application(server: Server[Any], port: int, token: str) -> Starlette:
    """The ASGI application at `/mcp`: 401 without the token, 421 for a foreign Host, 403 for a foreign Origin."""
    names = (f"{HOST}:{port}", f"localhost:{port}")
    return server.streamable_http_app(
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=list(names),
            allowed_origins=[f"http://{name}" for name in names],
        ),
        auth=AuthSettings(
            issuer_url=AnyHttpUrl(f"http://{HOST}:{port}"), resource_server_url=None, required_scopes=[_SCOPE]
        ),
        token_verifier=OneToken(token),
    )


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # so that whoever reads the address can connect at once
    except OSError as error:
        listener.close()
        raise SetupError(
            f"port {port} of {HOST} cannot be used", str(error), "give --port 0 to take a free one"
        ) from None
    return listener
