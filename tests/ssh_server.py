"""A target on the loopback interface: OpenSSH's own server with keys, configuration and a home folder of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")


@dataclass(frozen=True, slots=True)
class Server:
    """A running SSH server, and the other side's files: `home`, `bin` (first of its PATH), and `env`, a shell script
    that runs before each command there."""

    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def env(self) -> Path:
        return self.folder / "env.sh"

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

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

    def gone(self) -> bool:
        """Return whether every process there ends within some seconds."""
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.processes()

    def kill_processes(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def use_python(self, path: str | None = None, arguments: str = "") -> None:
        """Let `python3` there be a Python of this machine: this one, or another."""
        write_script(self.bin / "python3", f'exec {path or sys.executable} {arguments} "$@"')


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Start a server on a free port of 127.0.0.1; skip the test where there is none."""
    if SSHD is None or shutil.which("ssh-keygen") is None or not Path("/proc").is_dir():
        pytest.skip("there is no OpenSSH server on this machine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = Server(int(probe.getsockname()[1]), folder)
    _write_files(server)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        if not _answers(server, process):
            pytest.skip(f"sshd does not run here: {(folder / 'sshd.log').read_text()[-300:]}")
        yield server
    finally:
        process.terminate()
        process.wait()
        server.kill_processes()


def _answers(server: Server, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return True
        time.sleep(0.02)
    return False


def _write_files(server: Server) -> None:
    folder = server.folder
    for path in (server.home, server.bin):
        path.mkdir(parents=True)
    for name in ("host_key", "user_key", "other_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    shutil.copy(folder / "user_key.pub", folder / "authorized")
    host_key = (folder / "host_key.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {' '.join(host_key)}\n")
    server.env.write_text("")
    server.use_python()
    (folder / "command.sh").write_text(f'. "{server.env}"\neval "$1"\n')
    (folder / "force.sh").write_text(
        f"exec env -i HOME='{server.home}' PATH='{server.bin}':/usr/bin:/bin LANG=C.UTF-8 "
        f"""/bin/sh '{folder}/command.sh' "$SSH_ORIGINAL_COMMAND"\n"""
    )
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {server.port}\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        f"KbdInteractiveAuthentication no\nPermitRootLogin yes\nForceCommand /bin/sh {folder}/force.sh\n"
    )
    write_config(server)


def write_config(server: Server, key: str = "user_key", known: str = "known_hosts") -> None:
    """Write the configuration of ssh on this side."""
    server.config.write_text(
        f"Host *\n  IdentityFile {server.folder}/{key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {server.folder}/{known}\n  GlobalKnownHostsFile /dev/null\n"
    )
