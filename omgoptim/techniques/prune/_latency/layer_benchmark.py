"""Benchmark of single layers on one engine, with one session open at a time."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from omgoptim.runtimes import ENGINES, Session, SessionSettings
from omgoptim.techniques.prune._latency import single_layer
from omgoptim.techniques.prune._latency.latency_steps import rounding_of
from omgoptim.techniques.prune._latency.single_layer import SizedLayer, TimedLayer, sides
from omgoptim.techniques.registry import ModuleRun

BLOCKS = 4
"""Blocks of calls per visit; the fastest counts."""

SHORTEST_BLOCK_S, LONGEST_BLOCK_S = 0.0015, 0.01
"""Bounds of the seconds of a block: above the clock's and the scheduler's resolution, short enough for every point."""

SWEEP = (33, 36, 40, 44, 48, 52, 56, 60, 64, 72, 80, 96)
"""Output widths that distinguish tile sizes of 8, 16 and 32 channels."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Engine and settings with which single layers are timed."""

    runtime: str
    settings: SessionSettings
    scratch: Path
    seed: int

    def open(self, sized: SizedLayer) -> tuple[Session, Any]:
        """Open a session of the layer alone, and an input for it."""
        dtype = "float32"
        if ENGINES[self.runtime].runs == "program":
            thing: Any = single_layer.write_program(sized, self.scratch / "layer.onnx", self.seed)
        else:
            thing = single_layer.as_module(sized, self.settings.device, self.seed)
            dtype = str(sized.layer.weight.dtype).removeprefix("torch.")
        return self._session(thing, sized.input_shape, dtype)

    def empty_call_ms(self) -> float:
        """Return the overhead of a call of the engine, to be subtracted from a node's time; 0 for a module."""
        if ENGINES[self.runtime].runs == "module":
            return 0.0
        program = single_layer.write_empty_program(self.scratch / "empty.onnx")
        session, prepared = self._session(program, (1, 1), "float32")
        return min(blocks_ms(session, prepared, SHORTEST_BLOCK_S) for _ in range(2))

    def _session(self, thing: Any, shape: tuple[int, ...], dtype: str) -> tuple[Session, Any]:
        session = ENGINES[self.runtime].open(thing, single_layer.signature_of(shape, dtype), self.settings)
        values = np.random.default_rng(self.seed).standard_normal(shape, dtype=np.float32)
        return session, session.prepare({single_layer.INPUT: values})


@dataclass(slots=True)
class Times:
    """Fastest time of each point by pass."""

    by_point: dict[tuple[Any, ...], list[float]] = field(default_factory=dict)

    def ms(self, point: SizedLayer) -> float:
        return min(self.by_point[point.key])

    def apart(self, point: SizedLayer) -> float:
        """Return the relative distance of the second fastest visit from the fastest."""
        return _apart(self.by_point[point.key])

    def scatter(self) -> float:
        """Return the relative scatter of the two fastest visits: the 90 % quantile over the points."""
        spreads = sorted(_apart(some) for some in self.by_point.values() if len(some) > 1)
        return spreads[int(0.9 * (len(spreads) - 1))] if spreads else 0.0


def _apart(visits_ms: Sequence[float]) -> float:
    fastest = sorted(visits_ms)[:2]
    return fastest[-1] / fastest[0] - 1


@contextmanager
def bench_of(run: ModuleRun) -> Iterator[Bench]:
    """Lock the device and yield a benchmark; torch's number of threads is restored."""
    runtime = "torch_eager" if run.runtime == "torch_compile" else run.runtime
    threads = torch.get_num_threads()
    try:
        with run.measuring(), tempfile.TemporaryDirectory(dir=run.scratch) as folder:
            yield Bench(runtime, SessionSettings(run.threads, run.device), Path(folder), run.seed)
    finally:
        torch.set_num_threads(threads)


def visits(
    points: Sequence[SizedLayer], bench: Bench, block_s: float, seed: int, end: float | None = None
) -> dict[tuple[Any, ...], float]:
    """Return the milliseconds of each point by its key, in random order, one session open at a time.

    Args:
        points: layers at sizes, each once.
        bench: where.
        block_s: seconds per block of calls.
        seed: of the order.
        end: when to stop, on the clock of `time.perf_counter`, whatever is left.
    """
    ms: dict[tuple[Any, ...], float] = {}
    for point in random.Random(seed).sample(points, len(points)):
        if end is not None and time.perf_counter() > end:
            break
        session, prepared = bench.open(point)
        ms[point.key] = blocks_ms(session, prepared, block_s)
    return ms


def blocks_ms(session: Session, prepared: Any, block_s: float) -> float:
    """Return the milliseconds per call, the fastest of a few blocks after a warm-up."""
    session.seconds(prepared, 2)
    calls = max(1, round(block_s / max(session.seconds(prepared, 1), 1e-7)))
    return 1e3 * min(session.seconds(prepared, calls) for _ in range(BLOCKS))


def round_to_of(module: nn.Module, run: ModuleRun) -> int:
    """Return this machine's tile size in channels, measured by a sweep of twelve widths; 8 if none is clear.

    A convolution on a 14x14 map where the module has convolutions, else a Linear on 64 rows; about a second.
    """
    convolutions = any(isinstance(part, nn.Conv2d) for part in module.modules())
    layer: TimedLayer = nn.Conv2d(64, 96, 3, padding=1, bias=False) if convolutions else nn.Linear(256, 96)
    shape = (1, 64, 14, 14) if convolutions else (1, 64, 256)
    points = {width: SizedLayer(layer, shape, sides(layer)[0], width) for width in SWEEP}
    with bench_of(run) as bench:
        passes = [visits(list(points.values()), bench, LONGEST_BLOCK_S, seed) for seed in range(2)]
    return rounding_of({width: min(some[point.key] for some in passes) for width, point in points.items()})
