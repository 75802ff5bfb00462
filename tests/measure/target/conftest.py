"""A target on the loopback interface: OpenSSH's own server with keys, configuration and a home folder of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from omgoptim.measure.target.connection import CONFIG_VARIABLE

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")


@dataclass(frozen=True, slots=True)
class Server:
    """A running SSH server, and the other side's files.

    Attributes:
        url: the target.
        home: home folder there; nothing of the user's own.
        bin: first folder of the PATH there.
        env: a shell script that runs before each command there.
    """

    url: str
    port: int
    home: Path
    bin: Path
    env: Path
    config: Path

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "omgoptim" / "target"

    def processes(self) -> list[int]:
        """Processes that live there: those whose home folder is the target's."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"HOME={self.home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    """`make_server()`: a server with a home folder of its own, on a free port of 127.0.0.1."""
    if SSHD is None or shutil.which("ssh-keygen") is None or not Path("/proc").is_dir():
        pytest.skip("there is no OpenSSH server on this machine")
    started: list[subprocess.Popen[bytes]] = []

    def make() -> Server:
        folder = tmp_path_factory.mktemp("sshd")
        server = Server("", free_port(), folder / "home", folder / "bin", folder / "env.sh", folder / "ssh_config")
        for path in (server.home, server.bin):
            path.mkdir()
        for name in ("host_key", "user_key", "other_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(folder / "user_key.pub", folder / "authorized")
        host_key = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {' '.join(host_key)}\n")
        server.env.write_text("")
        write_script(server.bin / "python3", f'exec {sys.executable} "$@"')
        (folder / "force.sh").write_text(
            f"exec env -i HOME='{server.home}' PATH='{server.bin}':/usr/bin:/bin LANG=C.UTF-8 "
            f"""/bin/sh -c '. "{server.env}"; eval "$1"' sh "$SSH_ORIGINAL_COMMAND"\n"""
        )
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {server.port}\nHostKey {folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nPermitRootLogin yes\nForceCommand /bin/sh {folder}/force.sh\n"
        )
        server.config.write_text(
            f"Host *\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        )
        with contextlib.suppress(OSError):
            Path("/run/sshd").mkdir(exist_ok=True)
        log = (folder / "sshd.log").open("wb")
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log
        )
        log.close()
        started.append(process)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
                url = f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}"
                return Server(url, server.port, server.home, server.bin, server.env, server.config)
            time.sleep(0.02)
        pytest.skip(f"sshd does not run here: {(folder / 'sshd.log').read_text()[-300:]}")

    yield make
    for process in started:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def shared_server(make_server: Callable[[], Server]) -> Server:
    return make_server()


@pytest.fixture
def server(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server of all tests that leave its home folder as it is, and ssh configured for it."""
    monkeypatch.setenv(CONFIG_VARIABLE, str(shared_server.config))
    return shared_server
