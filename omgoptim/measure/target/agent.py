"""Agent on a target, which starts and times measuring processes.

It reads frames from its input and answers on its output. When the input ends, or nothing comes for `SILENCE_S`, it
ends, with every process that it started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from omgoptim.errors import ArtifactError, OmgoptimError, SetupError
from omgoptim.hardware import LoadMeter, cpu_features, cpu_name, memory_bytes, other_load, usable_cores
from omgoptim.measure.launch import Launch, LaunchParts, TimingPlan, run_launch
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.measure.target.frames import read_frame, write_frame
from omgoptim.measure.target.store import Store, find_packages, install_packages, unpack_packages
from omgoptim.models.security.file_integrity import sha256
from omgoptim.models.security.path_policy import PathPolicy

SILENCE_S = 60.0
"""Seconds without a frame after which the agent ends; the client sends one at least every 5 s."""

Answer = tuple[dict[str, Any], Path | None]


class Agent:
    """State of a connection. Each method `do_NAME` answers the frame `{"do": NAME, …}`."""

    def __init__(self, store: Store, uname: str, answers: BinaryIO) -> None:
        self.store, self.uname, self._answers = store, uname, answers
        self.frames: queue.Queue[dict[str, Any]] = queue.Queue()
        self.processes: dict[int, MeasuringProcess] = {}
        self._meter = LoadMeter()
        self._count = 0

    def serve(self, until: str | None = None) -> None:
        """Answer frames until one of the name `until` comes."""
        while True:
            frame = self.frames.get()
            name = str(frame.pop("do"))
            if name == until:
                return
            payload: Path | None = None
            try:
                handler: Callable[..., Answer] = getattr(self, f"do_{name}")
                answer, payload = handler(**frame)
            except OmgoptimError as error:
                answer = {"error": error.to_dict()}
            except Exception as error:  # noqa: BLE001  whatever fails here must reach the other side's report
                traceback.print_exc()
                answer = {
                    "error": SetupError("measuring on the target failed", f"{type(error).__name__}: {error}").to_dict()
                }
            write_frame(self._answers, answer, payload)

    def do_machine(self) -> Answer:
        """Describe the machine."""
        machine = {
            "uname": self.uname,
            "cpu": cpu_name(),
            "cpu_features": cpu_features(),
            "cores": usable_cores(),
            "memory_bytes": memory_bytes(),
            "python": sys.executable,
            "python_version": platform.python_version(),
            "platform": [platform.system(), self.uname.split()[-1], platform.python_implementation()],
            "libc": platform.libc_ver()[1],
            "cache": str(self.store.folder),
            "cache_bytes": self.store.size_bytes(),
        }
        return machine, None

    def do_packages(self, names: list[str], wanted: str, imported: bool) -> Answer:
        """Return the versions of packages."""
        return {"versions": find_packages(self.store, names, wanted, imported=imported)}, None

    def do_install(self, requirements: list[list[str]], wanted: str) -> Answer:
        """Install packages into the cache."""
        return {"failed": install_packages(self.store, requirements, wanted)}, None

    def do_unpack(self, digest: str, wanted: str) -> Answer:
        """Unpack sent packages into the cache."""
        unpack_packages(self.store, digest, wanted)
        return {}, None

    def do_missing(self, digests: list[str]) -> Answer:
        """Return which contents the cache lacks."""
        return {"missing": [digest for digest in digests if not self.store.has(digest)]}, None

    def do_put(self, digest: str, payload: str | None, failure: str = "") -> Answer:
        """Store sent content under its digest."""
        if payload is None:
            raise SetupError(
                "the target has no free disk space", failure, "free some, or let doctor clean the target's cache"
            )
        scratch = Path(payload)
        if sha256(scratch) != digest:
            raise ArtifactError(
                "a file was corrupted on its way to the target",
                f"its sha256 is not {digest}",
                "start the run again; if the error comes back, check the disk and the memory of the target",
            )
        scratch.replace(self.store.path(digest))
        return {}, None

    def do_artifact(self, name: str, files: dict[str, str]) -> Answer:
        """Build an artifact's folder from stored contents."""
        return {"folder": str(self.store.artifact(name, files))}, None

    def do_start(self, artifact: str, setup: dict[str, Any]) -> Answer:
        """Start a measuring process."""
        process = MeasuringProcess(Path(artifact), self._setup(**setup))
        self._count += 1
        self.processes[self._count] = process
        process.begin_open()
        return {"process": self._count}, None

    def do_opened(self, process: int) -> Answer:
        """Wait until a process has opened its artifact."""
        return self.processes[process].end_open(), None

    def do_another(self, process: int, artifact: str) -> Answer:
        """Open another artifact in a process."""
        return self.processes[process].open_another(Path(artifact)), None

    def do_ask(self, process: int, command: str, arguments: dict[str, Any]) -> Answer:
        """Pass a command on to a process."""
        return self.processes[process].ask(command, **arguments), None

    def do_outputs(self, process: int, digest: str) -> Answer:
        """Run a batch in a process and return the outputs."""
        target = self.store.session / "outputs.npz"
        self.processes[process].ask("outputs", inputs=str(self.store.path(digest)), target=str(target))
        return {}, target

    def do_close(self, process: int) -> Answer:
        """Close a process."""
        self.processes.pop(process).close()
        return {}, None

    def do_launch(
        self, artifacts: list[str], setup: dict[str, Any], plan: dict[str, Any], seed: str, parts: dict[str, Any],
        more: bool,
    ) -> Answer:  # fmt: skip
        """Time artifacts in one launch; with `more` each process answers further commands after its timing."""

        def on_open(index: int, process: MeasuringProcess) -> None:
            self.processes[0] = process
            write_frame(self._answers, {"event": "open", "index": index})
            self.serve(until="go_on")

        launch = Launch(
            [Path(artifact) for artifact in artifacts], self._setup(**setup), TimingPlan(**plan), seed,
            LaunchParts(**parts), on_open if more else None,
        )  # fmt: skip
        return {
            "results": [
                {"error": one.to_dict()} if isinstance(one, OmgoptimError) else dataclasses.asdict(one)
                for one in run_launch(launch)
            ]
        }, None

    def do_load(self) -> Answer:
        """Return the load by other processes."""
        return {"load": other_load()}, None

    def do_meter(self) -> Answer:
        """Begin to watch the load by other processes."""
        self._meter = LoadMeter()
        return {}, None

    def do_metered(self) -> Answer:
        """Return the load since `do_meter`."""
        return {"load": self._meter.load()}, None

    def do_hold(self, holder: str) -> Answer:
        """Lock the machine for measurements."""
        return {"holder": self.store.hold(holder)}, None

    def do_release(self) -> Answer:
        """Release the lock."""
        self.store.release()
        return {}, None

    def do_clean(self) -> Answer:
        """Empty the cache."""
        return {"freed_bytes": self.store.clean()}, None

    def _setup(self, threads: int, batches: dict[str, str]) -> TimingSetup:
        folder, paths = self.store.session, {name: self.store.path(digest) for name, digest in batches.items()}
        return TimingSetup(paths, 1, threads, folder, policy=PathPolicy(folder), same_machine=False)

    def end(self) -> None:
        """End every process of this connection, this one too."""
        self.store.close()
        with contextlib.suppress(OSError):
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)


def main(cache: str, uname: str, commands: BinaryIO) -> None:
    """Serve frames until the connection ends."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    agent = Agent(Store(Path(cache)), uname, answers)
    os.environ |= dict.fromkeys(("TMPDIR", "XDG_CACHE_HOME"), str(agent.store.session))  # engines write to both
    last = [time.monotonic()]

    def read() -> None:
        number = 0
        try:
            while (frame := read_frame(commands, agent.store.session / f"payload-{number}")) is not None:
                number += 1
                last[0] = time.monotonic()
                if frame["do"] != "ping":
                    agent.frames.put(frame)
        finally:
            agent.end()

    def watch() -> None:
        while time.monotonic() - last[0] < SILENCE_S:
            time.sleep(1)
        agent.end()

    for task in (read, watch):
        threading.Thread(target=task, daemon=True).start()
    write_frame(answers, {"ready": True})
    try:
        agent.serve()
    except OSError:  # the connection is gone, which the reader sees too
        agent.end()
