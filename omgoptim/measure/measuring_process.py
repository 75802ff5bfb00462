"""Client of measuring processes: setup, start and communication; `measuring_server.py` is the server."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.errors import ArtifactError, OmgoptimError
from omgoptim.hardware import cpu_features
from omgoptim.models.security.path_policy import PathPolicy

if TYPE_CHECKING:
    from omgoptim.measure.target.client import Target

PIPE_TIMEOUT_S = 2.0
"""Seconds that a child of the user's code may hold the pipe of a process that ended. Chosen: no run may hang on it."""

START = IMPORT_OMGOPTIM + "from omgoptim.measure.measuring_server import main\nmain()\n"


@dataclass(frozen=True, slots=True)
class TimingSetup:
    """Inputs, threads and project of a measurement, and the machine that it runs on."""

    batches: Mapping[str, Path]
    """.npz files under the names `latency` (batch 1) and `throughput`; without the second, throughput is not timed."""
    batch: int
    threads: int
    cwd: Path
    """The user's project, from which their code is imported."""
    device: str | None = None
    """Overrides the artifact's own."""
    policy: PathPolicy | None = None
    """The files and modules whose code the artifacts' recipes may name; None: the project only. The artifacts are
    trusted: the caller saved them or checked their origin."""
    target: Target | None = None
    """The machine to measure on; None: this one."""
    same_machine: bool = True
    """The artifacts were saved on this machine, so that they have to reproduce the recorded outputs; on another, whose
    kernels round differently, the differences are only reported."""
    hold: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Context that is open while a launch measures, after its processes have opened their artifacts."""
    pool: ProcessPool | None = None
    """Processes of this machine that launches share; None: each launch starts its own."""

    @property
    def cpu_features(self) -> Sequence[str]:
        """Instruction sets of the machine that measures."""
        return cpu_features() if self.target is None else self.target.machine.cpu_features

    def start(self, artifact: Path, batches: Mapping[str, Path]) -> MeasuringProcess:
        """Start a measuring process for an artifact, on the machine of the setup.

        Args:
            artifact: folder to open.
            batches: prepared batches by name, as .npz files.
        """
        if self.target is not None:
            return self.target.start(artifact, self, batches)
        return MeasuringProcess(artifact, self, batches)

    def lend(
        self, place: int, artifact: Path, batches: Mapping[str, Path]
    ) -> contextlib.AbstractContextManager[MeasuringProcess]:
        """Return a process of this machine for the artifact at a place of a launch: from the pool, or a fresh one."""
        if self.pool is not None:
            return self.pool.lend(place, artifact, self, batches)
        return MeasuringProcess(artifact, self, batches)


class ProcessPool:
    """Measuring processes that stay open from one launch to the next, for a search that times many artifacts.

    The time of one model differs from process to process; in the same process all artifacts share that deviation, and
    none waits for a start. Reported numbers come from fresh processes. A context manager that ends the processes.
    """

    def __init__(self) -> None:
        self._free: dict[int, MeasuringProcess] = {}

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        while self._free:
            self._free.popitem()[1].close()

    @contextlib.contextmanager
    def lend(
        self, place: int, artifact: Path, setup: TimingSetup, batches: Mapping[str, Path]
    ) -> Iterator[MeasuringProcess]:
        """Lend the process of a place in a launch, started if there is none; one that fails is ended."""
        process = self._free.pop(place, None) or MeasuringProcess(artifact, setup, batches)
        process.select(artifact, batches)
        with contextlib.ExitStack() as stack:
            stack.enter_context(process)
            yield process
            if process.running:
                stack.pop_all()
                self._free[place] = process


class MeasuringProcess:
    """A fresh process with one opened artifact at a time; a context manager that ends the process.

    Args:
        artifact: the artifact folder.
        setup: threads, project, device and policy.
        batches: prepared batches by name, as .npz files; default: those of the setup.
        limit_s: longest time one command may take.
    """

    def __init__(
        self,
        artifact: Path,
        setup: TimingSetup,
        batches: Mapping[str, Path] | None = None,
        limit_s: float = 900.0,
    ) -> None:
        self.artifact, self._limit_s = artifact, limit_s
        batches = setup.batches if batches is None else batches
        trusted = replace(setup.policy or PathPolicy.of(setup.cwd, []), trusted=True)
        self._open = {
            "artifact": str(artifact),
            "threads": setup.threads,
            "device": setup.device,
            "policy": trusted.to_json(),
            "batches": _paths(batches),
            "same_machine": setup.same_machine,
        }
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(setup.threads))
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(PACKAGE_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=setup.cwd,
            env=os.environ | threads | {"TOKENIZERS_PARALLELISM": "false"},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read_answers, daemon=True)
        self._reader.start()

    def __enter__(self) -> MeasuringProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(PIPE_TIMEOUT_S)

    @property
    def running(self) -> bool:
        """Return whether it has not ended."""
        return self._process.poll() is None

    def select(self, artifact: Path, batches: Mapping[str, Path]) -> None:
        """Choose what `begin_open` opens, in place of what is open."""
        self.artifact = artifact
        self._open = self._open | {"artifact": str(artifact), "batches": _paths(batches)}

    def begin_open(self) -> None:
        """Send the command to open its artifact, without waiting: several open side by side."""
        self._send("open", self._open)

    def end_open(self) -> dict[str, Any]:
        """Wait until it has opened the artifact and checked it against the recorded outputs."""
        return self._receive("open")

    def open_another(self, artifact: Path) -> dict[str, Any]:
        """Close the open artifact and open another of the same engine, for a search over many.

        Reported numbers come from a fresh process, never from one that held other artifacts before.
        """
        self.artifact = artifact
        self._open = self._open | {"artifact": str(artifact)}
        self.begin_open()
        return self.end_open()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            OmgoptimError: as the process reports it.
            ArtifactError: the process died or did not answer in time.
        """
        self._send(command, arguments)
        return self._receive(command)

    def run_samples(self, inputs: Path, target: Path, progress: Callable[[float], None] = lambda _: None) -> None:
        """Run every batch file of the folder `inputs`, in name order, and write the outputs to `target`.

        Args:
            inputs: folder of .npz files.
            target: folder for the outputs, a file of the same name each.
            progress: called with the fraction done; each batch has the whole time limit to itself.
        """
        target.mkdir(parents=True, exist_ok=True)
        files = sorted(inputs.glob("*.npz"))
        for index, file in enumerate(files):
            progress(index / len(files))
            self.ask("outputs", inputs=str(file), target=str(target / file.name))

    def _send(self, command: str, arguments: Mapping[str, Any]) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the measuring process has no input pipe")
        with contextlib.suppress(BrokenPipeError):  # `_receive` reports its death
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()

    def _receive(self, command: str) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self._limit_s)
        except queue.Empty:
            self._process.kill()
            raise ArtifactError(
                f"the measuring process did not answer '{command}' within {self._limit_s:g} s",
                f"artifact {self.artifact}",
            ) from None
        if not line.endswith("\n"):  # the end of its output, which may cut an answer
            code = self._process.wait()
            reason = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
            raise ArtifactError(
                f"the measuring process died during '{command}'",
                f"{reason}; artifact {self.artifact}" + ("; often because memory ran out" if code == -9 else ""),
                "the run's log has its last output",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OmgoptimError.from_dict(answer["error"])
        return answer

    def _read_answers(self) -> None:
        if self._process.stdout:
            with self._process.stdout as answers:
                for line in answers:
                    self._answers.put(line)
        self._answers.put("")


def _paths(batches: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in batches.items()}


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
