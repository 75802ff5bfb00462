"""Measuring process on a target, with the interface of a local one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.target.connection import TargetLost

if TYPE_CHECKING:
    from omgoptim.measure.target.client import Target

T = TypeVar("T")


class TargetProcess(MeasuringProcess):
    """A measuring process on a target. One that a lost connection ended is started again.

    Args:
        number: of a process that belongs to a launch there, and is started again with that.
    """

    def __init__(
        self, target: Target, artifact: Path, threads: int, batches: Mapping[str, Path], number: int | None = None
    ) -> None:
        self.artifact, self._target, self._threads, self._batches = artifact, target, threads, batches
        self._number, self._of_launch, self._generation = number, number is not None, target.generation
        self._opened: dict[str, Any] | None = {} if self._of_launch else None

    def close(self) -> None:
        """Close the process on the target."""
        if self._number is None or self._of_launch or self._generation != self._target.generation:
            return
        try:
            self._target.connection.request("close", process=self._number)
        except TargetLost:
            return

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_open(self) -> None:
        """Start the process on the target, without waiting for it."""
        self._retry(self._start)

    def end_open(self) -> dict[str, Any]:
        """Wait until the artifact is open."""
        return self._retry(self._wait_open)

    def open_another(self, artifact: Path) -> dict[str, Any]:
        """Open another artifact in the same process."""
        self.artifact = artifact

        def change() -> dict[str, Any]:
            if self._opened is None:
                return self._wait_open()
            folder = self._target.send_artifact(artifact)
            return self._target.connection.request("another", process=self._number, artifact=folder)

        return self._retry(change)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Pass a command on to the process."""

        def ask() -> dict[str, Any]:
            self._wait_open()
            return self._target.connection.request("ask", process=self._number, command=command, arguments=arguments)

        return self._retry(ask)

    def run_samples(self, inputs: Path, target: Path, progress: Callable[[float], None] = lambda _: None) -> None:
        """Run every batch file of a folder on the target, and write the outputs here."""
        target.mkdir(parents=True, exist_ok=True)
        files = sorted(inputs.glob("*.npz"))

        def send() -> dict[str, str]:
            return self._target.send_files({file.name: file for file in files})

        digests = self._retry(send)
        for index, file in enumerate(files):
            progress(index / len(files))

            def run(digest: str = digests[file.name]) -> Path:
                self._wait_open()
                return Path(self._target.connection.request("outputs", process=self._number, digest=digest)["payload"])

            shutil.move(self._retry(run), target / file.name)

    def _start(self) -> None:
        connection = self._target.connection
        folder = self._target.send_artifact(self.artifact)
        batches = self._target.send_files(self._batches)
        setup = {"threads": self._threads, "batches": batches}
        self._number = connection.request("start", artifact=folder, setup=setup)["process"]
        self._generation, self._opened = self._target.generation, None

    def _wait_open(self) -> dict[str, Any]:
        if self._generation != self._target.generation or self._number is None:
            self._start()
        if self._opened is None:
            self._opened = self._target.connection.request("opened", process=self._number)
        return self._opened

    def _retry(self, action: Callable[[], T]) -> T:
        return action() if self._of_launch else self._target.retry(action)
