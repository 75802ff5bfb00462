"""The one small protocol behind which every engine stands. No torch.

An engine runs either the module itself (torch) or a program file (ONNX). It says whether this Python can use it, and
opens what it is given as a `Session`, which is all that measuring ever sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NumpyBatch = Mapping[str, NDArray[Any]]
"""Input name to array, the batch first."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a session is opened with."""

    threads: int
    device: str = "cpu"
    precision: str = "float32"
    """float32, bfloat16, float16, int8 or int8_dynamic: what the artifact was saved as."""


@dataclass(frozen=True, slots=True)
class Session:
    """An opened model. `prepare` is outside the clock, `call` is what is timed."""

    prepare: Callable[[NumpyBatch], Any]
    """Numpy batch to the engine's own input form, on its device."""
    call: Callable[[Any], Any]
    """One forward; returns the engine's own output form."""
    to_numpy: Callable[[Any], list[NDArray[Any]]]
    """The outputs as a flat list of arrays; floating ones as float32."""
    seconds: Callable[[Any, int], float]
    """Seconds per call over n calls on a prepared batch, the device synchronised."""
    module: Any = None
    """The torch module, where there is one: for the time per layer."""
    peak_device_bytes: Callable[[], int | None] = field(default=lambda: None)
    """Peak memory on a GPU since the session was opened, or None on a CPU."""

    def run(self, batch: NumpyBatch) -> list[NDArray[Any]]:
        """The outputs for a numpy batch."""
        return self.to_numpy(self.call(self.prepare(batch)))


@dataclass(frozen=True, slots=True)
class Engine:
    """A registered engine."""

    name: str
    runs: Literal["module", "program"]
    missing: Callable[[str], str | None]
    """For a device: None if this Python can use the engine on it, else why not and what to install."""
    open: Callable[[Any, Any, Settings], Session]
    """`open(module or program path, signature, settings)`."""


def wall_clock(call: Callable[[Any], Any]) -> Callable[[Any, int], float]:
    """`Session.seconds` for an engine whose calls return when the work is done."""

    def seconds(prepared: Any, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call(prepared)
        return (time.perf_counter() - start) / calls

    return seconds


def as_float32(array: NDArray[Any]) -> NDArray[Any]:
    """Floating arrays as float32, anything else as it is."""
    return array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array
