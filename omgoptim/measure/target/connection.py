"""Connection to a target: one ssh process with the user's own configuration. No torch, no numpy.

The user's configuration, keys, agent, jump hosts and known hosts decide, as in a shell. Nothing is asked
(`BatchMode`), host keys are checked as ssh is configured to, and nothing is forwarded.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from omgoptim.errors import OmgoptimError, SetupError
from omgoptim.measure.target.frames import read_frame, write_frame
from omgoptim.measure.target.package import MARK, OLDEST, MeasuringPackage, measuring_package, remote_command
from omgoptim.requests.base import TargetAddress
from omgoptim.text import clean

CONFIG_VARIABLE = "OMGOPTIM_SSH_CONFIG"
"""Environment variable: a configuration file for ssh in place of ~/.ssh/config."""

OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
)
"""`ClearAllForwardings` and -a -x: no forwarding to this machine, whatever the configuration says."""

HELLO_LIMIT_S = 30.0
"""Limit of connecting, logging in and starting Python: jump hosts and slow boards take some ten seconds."""
PING_S = 5.0
"""Interval of pings, well below the agent's `SILENCE_S`."""
SPACE_BYTES = 64 * 2**20
"""Minimum free space. Chosen: the package and buffered results take a few MiB."""
MAX_BANNER_LINES = 1000
"""Lines that a login shell may print before the agent's answer. Chosen: a safeguard."""


class TargetLost(Exception):
    """The connection was lost during an action, which is repeated over a new one."""


class Connection:
    """An ssh process with an agent at its other end; `close` ends both.

    Raises:
        SetupError: the host is not reached, or has no Python to measure with; within `HELLO_LIMIT_S`.
    """

    def __init__(self, address: TargetAddress) -> None:
        self.address = address
        self._scratch = tempfile.TemporaryDirectory(prefix="omgoptim-target-")
        self._frames: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stderr_lines: deque[str] = deque(maxlen=20)
        self._writing, self._ended = threading.Lock(), threading.Event()
        package = measuring_package()
        try:
            self._process = subprocess.Popen(
                ssh_command(address, remote_command(package.name)),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            self._scratch.cleanup()
            raise SetupError("ssh cannot be started", str(error), "install the OpenSSH client") from None
        self._threads = [threading.Thread(target=task, daemon=True) for task in (self._read, self._log_stderr)]
        for thread in self._threads:
            thread.start()
        try:
            self._greet(package)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._ping, daemon=True).start()

    def request(self, do: str, payload: Path | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a frame and wait for the next one.

        Raises:
            OmgoptimError: what the agent answered.
            TargetLost: the connection ended.
        """
        self.send(do, payload, **arguments)
        return self.receive()

    def send(self, do: str, payload: Path | None = None, **arguments: Any) -> None:
        """Send a frame."""
        if self._process.stdin is None:
            raise RuntimeError("ssh has no input pipe")
        with self._writing:
            try:
                write_frame(self._process.stdin, {"do": do, **arguments}, payload)  # type: ignore[arg-type]
            except (BrokenPipeError, ConnectionError, ValueError) as error:
                raise TargetLost(str(error)) from None

    def receive(self) -> dict[str, Any]:
        """Wait for a frame."""
        frame = self._frames.get()
        if frame is None:
            self._frames.put(None)
            raise TargetLost(self._last_lines())
        if "failure" in frame:
            raise OSError(f"a file cannot be stored on {self.address}: {frame['failure']}")
        if "error" in frame:
            error = OmgoptimError.from_dict(frame["error"])
            raise type(error)(f"{error.what} (on {self.address})", error.why, error.fix, error.log)
        return frame

    def close(self) -> None:
        """End the connection and every process on the target that belongs to it."""
        self._ended.set()
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(2)
        for stream in (self._process.stdout, self._process.stderr):
            if stream and not any(thread.is_alive() for thread in self._threads):
                stream.close()
        self._scratch.cleanup()

    def _greet(self, package: MeasuringPackage) -> None:
        try:
            hello = self._frames.get(timeout=HELLO_LIMIT_S)
        except queue.Empty:
            self._process.kill()
            raise self._unreachable(f"it did not answer within {HELLO_LIMIT_S:g} s") from None
        if hello is None:
            raise self._unreachable(self._last_lines() or f"ssh ended with status {self._process.wait()}")
        if hello.get("refused") == "python":
            oldest = ".".join(map(str, OLDEST))
            found = (
                f"found {hello['found']}, which is too old"
                if hello["found"]
                else "no Python is on the PATH of its non-interactive shell"
            )
            raise SetupError(
                f"{self.address} has no Python {oldest} or newer",
                f"{found} ({hello['uname']}); measuring needs Python, numpy and an engine on the target",
                f"install Python {oldest} or newer as python3 on the target",
            )
        if hello.get("refused") == "disk" or hello["free"] < SPACE_BYTES:
            why = hello.get("found") or f"{hello['free'] / 2**20:.0f} MiB are free in {hello['cache']}"
            raise SetupError(f"{self.address} has no free disk space", why, "free some, or set XDG_CACHE_HOME there")
        try:
            if not hello["has_code"]:
                self._send_package(package)
            self.receive()
        except TargetLost as lost:
            raise SetupError(f"{self.address} cannot be used", str(lost), "the run's log has its output") from None

    def _send_package(self, package: MeasuringPackage) -> None:
        if self._process.stdin is None:
            raise RuntimeError("ssh has no input pipe")
        try:
            self._process.stdin.write(f"{len(package.archive)}\n".encode() + package.archive)
            self._process.stdin.flush()
        except OSError as error:
            raise TargetLost(str(error)) from None

    def _unreachable(self, why: str) -> SetupError:
        command = shlex.join(ssh_command(self.address, "true", options=("BatchMode=yes",)))
        return SetupError(
            f"{self.address} cannot be reached",
            why,
            f"make this command work without a prompt: {command} (use a key without passphrase or an agent; connect "
            "once by hand to accept the host key)",
        )

    def _last_lines(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._threads[1].join(1)
        return "; ".join(list(self._stderr_lines)[-3:])

    def _read(self) -> None:
        """Put the greeting and then every frame into the queue; None at the end."""
        stream = self._process.stdout
        number = 0
        try:
            for _ in range(MAX_BANNER_LINES):
                line = stream.readline(65536) if stream else b""
                if not line:
                    return
                if line.startswith(MARK.encode()):
                    self._frames.put(json.loads(line[len(MARK) :]))
                    break
            while stream:
                number += 1
                frame = read_frame(stream, Path(self._scratch.name) / str(number))  # type: ignore[arg-type]
                if frame is None:
                    return
                self._frames.put(frame)
        except (OSError, ValueError) as error:
            self._stderr_lines.append(str(error))
        finally:
            self._frames.put(None)

    def _log_stderr(self) -> None:
        """Write the target's standard error to the run's log."""
        for line in self._process.stderr or ():
            text = clean(line.decode("utf-8", errors="replace"), 500)
            self._stderr_lines.append(text)
            with contextlib.suppress(OSError, ValueError):
                print(text, file=sys.stderr)  # noqa: T201

    def _ping(self) -> None:
        while not self._ended.wait(PING_S):
            with contextlib.suppress(TargetLost):
                self.send("ping")


def ssh_command(address: TargetAddress, command: str, options: tuple[str, ...] = OPTIONS) -> list[str]:
    """Return the command that runs a command on a target."""
    config = os.environ.get(CONFIG_VARIABLE)
    parts = ["ssh", "-T", "-a", "-x", *(["-F", config] if config else [])]
    for option in options:
        parts += ["-o", option]
    return [*parts, *(["-p", str(address.port)] if address.port else []), "--", address.login, command]
