"""Address of a machine to measure on: `ssh://[user@]host[:port]`. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omgoptim.errors import RequestError, argument

ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?:(?P<host>[A-Za-z0-9][A-Za-z0-9._-]{0,252})|\[(?P<ipv6>[0-9A-Fa-f:.]{2,45})\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
"""A user or a host never begins with a dash, which ssh would read as an option."""


@dataclass(frozen=True, slots=True)
class TargetAddress:
    """Host, and the user and port where they are given; else the user's SSH configuration decides."""

    host: str
    user: str | None = None
    port: int | None = None

    @staticmethod
    def parse(text: str) -> TargetAddress:
        """Read `ssh://[user@]host[:port]`; an IPv6 address stands in brackets.

        Raises:
            RequestError: it is anything else, such as a path, a password, a shell character or an option of ssh.

        Example:
            >>> from omgoptim.requests.target import TargetAddress
            >>> TargetAddress.parse("ssh://pi@192.0.2.7:2222")
            TargetAddress(host='192.0.2.7', user='pi', port=2222)
        """
        found = ADDRESS.fullmatch(text)
        port = int(found["port"]) if found and found["port"] else None
        if found is None or (port is not None and not 0 < port < 65536):
            raise RequestError(
                f"'{text[:80]}' is not a target",
                "a target is ssh://host, ssh://user@host or ssh://user@host:port: letters, digits, dots and dashes, "
                "no path, no password, no options",
                f"give {argument('target', 'ssh://user@host')}; jump hosts and keys belong to ~/.ssh/config",
            )
        return TargetAddress(found["host"] or found["ipv6"], found["user"], port)

    @property
    def login(self) -> str:
        """`user@host`, as ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"
