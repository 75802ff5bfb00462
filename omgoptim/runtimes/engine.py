"""Engine protocol: sessions, and the records of nodes and kernels. No torch.

An engine runs either the module itself (torch) or a program file (ONNX). It reports whether this Python can use it, and
opens a module or program as a `Session`, the only interface that measuring uses.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NumpyBatch = Mapping[str, NDArray[Any]]
"""Input name to array, the batch first."""

WARM_UP, MIN_PROFILED, MAX_PROFILED = 2, 5, 100
"""Calls of a program with profiling on. Chosen by memory: an engine keeps a record of every node of every call."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Threads, device and precision of a session."""

    threads: int
    device: str = "cpu"
    precision: str = "float32"
    """float32, bfloat16, float16, int8 or int8_dynamic: what the artifact was saved as."""
    mixed_precision: bool = False
    """Keep layers in float that stand between quantized ones."""


@dataclass(frozen=True, slots=True)
class NodeTime:
    """Time of one node of a program, under the engine's name for it after fusion."""

    name: str
    kind: str
    """The engine's operator."""
    ms: float
    """Median over the calls, the work of nodes inside it not included."""
    covers: tuple[str, ...] = ()
    """Names of the nodes it was fused from, if the engine reports them."""
    computed_in: str | None = None
    """Compute dtype: int8, bfloat16, float16, float32; None if the engine does not report it."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Kernel that an engine runs for one node of a program or one layer of a module, with its compute dtype."""

    name: str
    """The node's name, as the engine has it after its own fusing; of a module the layer's path."""
    kind: str
    """The engine's operator, or the layer's class."""
    computed_in: str | None = None
    """int8, bfloat16, float16, float32; None if unreported, or nothing is computed."""
    covers: tuple[str, ...] = ()
    """Names of the nodes it was fused from, if the engine reports them."""


@dataclass(frozen=True, slots=True)
class Session:
    """An opened model. `prepare` is not timed, `call` is."""

    prepare: Callable[[NumpyBatch], Any]
    """Numpy batch to the engine's own input form, on its device."""
    call: Callable[[Any], Any]
    """Run the forward once; return the engine's own output form."""
    to_numpy: Callable[[Any], list[NDArray[Any]]]
    """The outputs as a flat list of arrays; floating ones as float32."""
    seconds: Callable[[Any, int], float]
    """Seconds per call over n calls on a prepared batch, the device synchronised."""
    module: Any = None
    """The torch module, if there is one, for the time per layer."""
    node_times: Callable[[Any, float], list[NodeTime]] | None = None
    """Time per node of a program on a prepared batch, called for so many seconds with profiling on, in a second
    session. A module's layers are timed by hooks instead."""
    peak_device_bytes: Callable[[], int | None] = field(default=lambda: None)
    """Peak memory on a GPU since the session was opened, or None on a CPU."""

    def run(self, batch: NumpyBatch) -> list[NDArray[Any]]:
        """Return the outputs for a numpy batch."""
        return self.to_numpy(self.call(self.prepare(batch)))


@dataclass(frozen=True, slots=True)
class Engine:
    """A registered engine."""

    name: str
    runs: Literal["module", "program", "lowered"]
    """A module; an ONNX program; or a program that was lowered from the module for this engine alone."""
    missing: Callable[[str], str | None]
    """For a device: None if this Python can use the engine on it, else why not and what to install."""
    open: Callable[[Any, Any, SessionSettings], Session]
    """`open(module or program path, signature, settings)`."""


def wall_clock(call: Callable[[Any], Any]) -> Callable[[Any, int], float]:
    """Return `Session.seconds` for an engine whose calls return when the work is done."""

    def seconds(prepared: Any, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call(prepared)
        return (time.perf_counter() - start) / calls

    return seconds


def profiled_calls(seconds: float) -> Iterator[bool]:
    """Yield, for each call to profile, whether it counts: the first ones only warm up.

    Goes on for `seconds`, for at least `MIN_PROFILED` and at most `MAX_PROFILED` counted calls.
    """
    for _ in range(WARM_UP):
        yield False
    end = time.perf_counter() + seconds
    for count in range(MAX_PROFILED):
        if count >= MIN_PROFILED and time.perf_counter() >= end:
            return
        yield True


def medians(calls: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each entry over the calls that have it."""
    times: dict[str, list[float]] = {}
    for call in calls:
        for name, ms in call.items():
            times.setdefault(name, []).append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


SOURCE_PLACE = re.compile(
    r"/?(?:[\w.+-]+/)*[\w.+-]+\.(?:cc|cpp|cxx|cu|h|hpp):\d+:?\s*"
    r"(?:[\w:&*<>,~ ]*::[\w~<>]+\([^()]*\)(?: const)?\s*)?"
)
"""A place in an engine's own source, and the C++ function that stands there."""

ERROR_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
"""Prefix of ONNX Runtime's error messages."""
NO_CAUSE = re.compile(r"(Exception from|Please fix either|Check '.*' failed at|While validating node)\b.*|[\s:.]*")
"""Lines of an engine's message without a cause: source locations and general advice."""


def engine_message(error: BaseException) -> str:
    """Return the line of an engine's error with the cause, without locations in the engine's source.

    That is the last line of an error that comes out of C++, whose lines go from the caller to the cause, and the first
    one of any other. An indented line continues the one before it.
    """
    lines: list[str] = []
    from_engine = False
    for raw in str(error).splitlines():
        from_engine |= bool(ERROR_PREFIX.match(raw) or SOURCE_PLACE.search(raw) or raw.startswith("Exception from"))
        line = SOURCE_PLACE.sub("", ERROR_PREFIX.sub("", raw)).rstrip()
        if NO_CAUSE.fullmatch(line.strip()):
            continue
        if raw[:1].isspace() and lines:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line.strip())
    return lines[-1 if from_engine else 0] if lines else type(error).__name__


def as_float32(array: NDArray[Any]) -> NDArray[Any]:
    """Convert floating arrays to float32 and leave others unchanged."""
    return array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array
