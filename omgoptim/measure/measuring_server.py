"""Server side of a measuring process: one artifact at a time, commands as lines on a pipe.

Commands and answers are JSON objects. An ONNX artifact's process imports no torch, so that its peak memory is the
model's own. What the user's code prints goes to the run's log. The process ends when its input is closed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import ArtifactError, ModelError, OmgoptimError
from omgoptim.models.artifact import open_session
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import verify_outputs
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes import Session
from omgoptim.runtimes.engine import Kernel, engine_message

MIN_SAMPLE_S = 1e-4
"""Seconds below which calls are timed in batches. Chosen: the clock itself would count."""

WARM_UP_FRACTION = 0.25
"""Fraction at the start of a turn that is dropped. Chosen: caches and thread pools warm up, the rest must suffice."""

BUSY_CORE = 0.5
"""Busy cores below which a process waits or shares its core with others for most of the time. Chosen."""

SPIN_COUNT = 2_000_000
"""Additions that measure how much of a core is free: about 20 ms."""

LAYER_TIMING_S = 1.0
"""Seconds for which a model is called to time its layers. Chosen: some calls even of slow models."""


class MeasuringServer:
    """State of the measuring process: the opened session and its prepared batches."""

    def __init__(self) -> None:
        self.manifest: Manifest
        self.session: Session
        self.device: str
        self.prepared: dict[str, Any] = {}

    def open(
        self,
        artifact: str,
        threads: int,
        device: str | None,
        policy: dict[str, Any],
        batches: dict[str, str],
        same_machine: bool = True,
    ) -> dict[str, Any]:
        """Open the artifact, check it against its record, and prepare the named batches (.npz files).

        One that was open before is closed first: the two never take memory together.

        Args:
            artifact: folder to open.
            threads: of the engine.
            device: default: the artifact's.
            policy: the files and modules whose code the artifact's recipe may name.
            batches: name to path of a .npz file.
            same_machine: refuse outputs other than the recorded ones; NaN is refused everywhere.
        """
        self.prepared = {}
        self.__dict__.pop("session", None)
        start = time.perf_counter()
        self.device = device or Manifest.read(Path(artifact)).device
        self.manifest, self.session = open_session(Path(artifact), threads, PathPolicy.from_json(policy), device)
        opened = time.perf_counter() - start
        differences = verify_outputs(Path(artifact), self.manifest, self.session, same_machine=same_machine)
        for name, path in batches.items():
            self.prepared[name] = self.session.prepare(_read(Path(path)))
        return {"open_s": opened, "differences": differences}

    def warm(self, batch: str) -> dict[str, Any]:
        """Call until the time per call is stable; return seconds per call."""
        first = self.session.seconds(self.prepared[batch], 1)
        budget, spent, last = 3.0, first, first
        while spent < budget:
            calls = max(1, int(0.05 / max(last, 1e-6)))
            current = self.session.seconds(self.prepared[batch], calls)
            spent += current * calls
            if abs(current - last) < 0.1 * last:
                return {"call_s": current}
            last = current
        return {"call_s": last}

    def turn(self, batch: str, seconds: float) -> dict[str, Any]:
        """Call for `seconds` and drop the first quarter; of slow calls, the first call.

        Returns the median and 90th percentile, in seconds, how many calls they come from, and the share of the time
        in which the process neither computed nor waited for a core.
        """
        prepared, clock = self.prepared[batch], self.session.seconds
        began, began_busy = time.perf_counter(), time.process_time()
        first = clock(prepared, 1)
        dropped = first >= seconds * WARM_UP_FRACTION
        calls = max(1, round(MIN_SAMPLE_S / max(first, 1e-9))) if first < MIN_SAMPLE_S else 1
        times: list[float] = []
        kept_from = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or len(times) == kept_from:
            if elapsed < seconds * WARM_UP_FRACTION and not dropped:
                kept_from = len(times) + 1
            times.append(clock(prepared, calls))
        counted = times[kept_from:]
        busy = (time.process_time() - began_busy) / max(time.perf_counter() - began, 1e-9)
        idle = max(0.0, 1 - busy / (_core_share() if busy < BUSY_CORE else 1.0))
        median, slowest = float(np.median(counted)), float(np.quantile(counted, 0.9))
        return {"p50": median, "p90": slowest, "calls": len(counted) * calls, "idle": idle}

    def memory(self) -> dict[str, Any]:
        """Return the peak memory so far, in bytes."""
        on_gpu = self.device == "cuda"  # not every engine reports device memory; the host's is no substitute
        return {"peak_bytes": self.session.peak_device_bytes() if on_gpu else peak_resident_bytes()}

    def outputs(self, inputs: str, target: str) -> dict[str, Any]:
        """Run the batch of the .npz file `inputs` and write its outputs to the .npz file `target`."""
        arrays = self.session.run(_read(Path(inputs)))
        for index, array in enumerate(arrays):
            if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
                where = Path(inputs).stem + (f", row {int(np.argwhere(np.isnan(array))[0][0])}" if array.ndim else "")
                raise ModelError(
                    f"the model's outputs contain NaN on the evaluation data with {self.manifest.runtime}",
                    f"output {index} of batch {where}: {int(np.isnan(array).sum())} of {array.size} values are NaN",
                    "check that sample and the weights",
                )
        np.savez(target, **{str(index): array for index, array in enumerate(arrays)})  # type: ignore[arg-type]
        return {}

    def nodes(self, batch: str) -> dict[str, Any]:
        """Return the time of each node of a program, by its engine's profile; empty if the engine reports none."""
        times = self.session.node_times(self.prepared[batch], LAYER_TIMING_S) if self.session.node_times else []
        return {"nodes": [dataclasses.asdict(time) for time in times]}

    def layers(self, batch: str, macs_by_path: dict[str, int], top: int) -> dict[str, Any]:
        """Return the slowest layers of a module, by hooks."""
        from omgoptim.measure.self_time import costliest_layers

        args, kwargs = self.prepared[batch]
        found = costliest_layers(self.session.module, args, kwargs, macs_by_path, top, LAYER_TIMING_S)
        return {"layers": [layer.model_dump() for layer in found]}

    def kernels(self, batch: str) -> dict[str, Any]:
        """Return the kernel and compute dtype of each node or layer; empty if the engine reports none.

        A program is asked in a second session with profiling on, so ask when all timing is done.
        """
        found: list[Kernel] = []
        if self.session.node_times is not None:
            times = self.session.node_times(self.prepared[batch], 0.0)
            found = [Kernel(time.name, time.kind, time.computed_in, time.covers) for time in times]
        elif self.session.module is not None:
            from omgoptim.runtimes.torch_precision import kernels_of

            found = kernels_of(self.session.module)
        return {"kernels": [dataclasses.asdict(kernel) for kernel in found]}

    def kinds(self, batch: str) -> dict[str, Any]:
        """Return the time of each node or layer, with its kind and its compute dtype."""
        found: list[tuple[str, float, str | None]] = []
        if self.session.node_times is not None:
            found = [
                (t.kind, t.ms, t.computed_in) for t in self.session.node_times(self.prepared[batch], LAYER_TIMING_S)
            ]
        elif self.session.module is not None:
            from omgoptim.measure.self_time import costliest_layers
            from omgoptim.runtimes.torch_precision import kernels_of

            numbers = {kernel.name: kernel.computed_in for kernel in kernels_of(self.session.module)}
            args, kwargs = self.prepared[batch]
            for layer in costliest_layers(self.session.module, args, kwargs, {}, sys.maxsize, LAYER_TIMING_S):
                found.append((layer.kind, layer.time_ms or 0.0, numbers.get(layer.path)))
        return {"kinds": [dict(zip(("kind", "ms", "computed_in"), entry, strict=True)) for entry in found]}


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory of this process.

    Linux keeps it in VmHWM, which starts anew with the program; `ru_maxrss` would be the parent's where the child was
    forked from a larger process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return int(line.split()[1]) * 1024 if line else None
    try:
        import psutil
    except ImportError:  # on a target, which has only what an engine needs
        return _maxrss()
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", 0)) or _maxrss()


def _maxrss() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _core_share() -> float:
    """Return the share of a core that a process which never waits gets now, 0..1: below 1 on a loaded machine."""
    began, began_busy = time.perf_counter(), time.process_time()
    sum(range(SPIN_COUNT))
    took = time.perf_counter() - began
    return min(1.0, max(0.01, (time.process_time() - began_busy) / took)) if took > 0 else 1.0


def _read(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer commands until the input ends."""
    server = MeasuringServer()
    for line in commands:
        request = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(server, request.pop("command"))
        try:
            answer = command(**request)
        except OmgoptimError as error:
            answer = {"error": error.to_dict()}
        except Exception as error:  # noqa: BLE001  an engine's own failure must reach the report, not end it
            import traceback

            traceback.print_exc()
            answer = {"error": ArtifactError("the engine failed on the artifact", _reason(server, error)).to_dict()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _reason(server: MeasuringServer, error: Exception) -> str:
    """Return the relevant line of an error: the first of a Python error in a module, the last of an engine's."""
    session = getattr(server, "session", None)
    lines = str(error).strip().splitlines() if session is not None and session.module is not None else []
    return f"{type(error).__name__}: {lines[0] if lines else engine_message(error)}"


def main() -> None:
    """Serve commands on the original stdin and stdout; the user's prints go to stderr, the run's log."""
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(commands, answers)
