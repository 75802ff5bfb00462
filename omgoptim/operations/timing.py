"""Full timing measurement, with checks of the machine's load."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from omgoptim.errors import OmgoptimError
from omgoptim.hardware import LoadMeter, other_load
from omgoptim.measure.launch import LATENCY, SLOW_S, THROUGHPUT, TimingPlan
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.measure.timing import PLANS, Timing, time_artifacts
from omgoptim.models.samples import Samples, repeat_to_size
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.context import RunContext, Stage

BUSY = 0.25
"""Load by other processes, as a fraction of the machine, above which there are more launches and a warning. Chosen
(docs/timing.md)."""

OVERLOADED = 0.45
"""Load above which no speedup is reported: thread pools wait for cores then. Chosen (docs/timing.md)."""

AS_FAST, AS_FAST_ONCE, AS_FAST_UNDER_LOAD = 1.02, 1.1, 1.25
"""Factors within which times count as equal: over several launches, in a single one, on an overloaded machine. Chosen:
`standard` adds launches while the interval is wider than 3 %; one process alone gives no interval (docs/timing.md)."""

PATIENCE_S = {"quick": 0.0, "standard": 20.0, "careful": 60.0}
"""Seconds that a run waits for an idle machine, by timing. Chosen (docs/timing.md)."""


class TimedRequest(Protocol):
    """Request of a run that is timed in full."""

    @property
    def timing(self) -> str:
        """Thoroughness: quick, standard or careful."""

    @property
    def seed(self) -> int:
        """Seed of the order of turns."""


@dataclass(frozen=True, slots=True)
class FullTiming:
    """Timings of a full measurement, with the load by other processes: the larger of before and during it."""

    timings: list[Timing | OmgoptimError]
    load: float

    def timing(self, index: int) -> Timing:
        """Return the timing of one artifact.

        Raises:
            OmgoptimError: the error of its measurement.
        """
        found = self.timings[index]
        if isinstance(found, OmgoptimError):
            raise found
        return found


def timing_setup(
    context: RunContext, samples: Samples, batch: int | None, threads: int, device: str, policy: PathPolicy
) -> TimingSetup:
    """Write the batches of the timing and return its settings.

    `batch` is the batch size for throughput; None to measure latency at batch 1 only.
    """
    context.work.mkdir(parents=True, exist_ok=True)
    batches = {}
    sizes = {LATENCY: 1} | ({THROUGHPUT: batch} if batch is not None else {})
    for name, size in sizes.items():
        batches[name] = context.work / f"{name}.npz"
        np.savez(batches[name], **repeat_to_size(samples, size))  # type: ignore[arg-type]
    return TimingSetup(batches, batch or 1, threads, context.project, device, policy, context.target)


def time_in_full(
    artifacts: Sequence[Path],
    bench: TimingSetup,
    request: TimedRequest,
    stage: Stage,
    on_first: Callable[[int, MeasuringProcess], None] | None = None,
    limit_s: float = math.inf,
) -> FullTiming:
    """Time artifacts against the first, after waiting for an idle machine.

    Args:
        artifacts: folders; the first is the reference.
        bench: batches and settings of the timing.
        request: with the thoroughness of the timing, and the seed of the order of turns.
        stage: part of the run that this is.
        on_first: `on_first(index, process)`, called in the first launch of each artifact.
        limit_s: seconds within which the launches after the second must end, the wait included.
    """
    context = stage.context
    with context.measuring():
        began = time.monotonic()
        load = _wait_until_idle(stage, min(PATIENCE_S[request.timing], max(0.0, limit_s / 4)))
        meter = LoadMeter() if context.target is None else context.target.meter()
        timings = time_artifacts(
            artifacts,
            bench,
            replace(_plan(request.timing, load), limit_s=limit_s - (time.monotonic() - began)),
            request.seed,
            stage.report,
            on_first,
        )
        return FullTiming(timings, max(load, meter.load()))


def fraction_progress(context: RunContext, doing: str) -> Callable[[float], None]:
    """Return a progress callback for a part whose share of the run is unknown."""
    return lambda done: context.progress(f"{doing}: {done:.0%}", None)


def _wait_until_idle(stage: Stage, patience_s: float) -> float:
    """Wait for an idle machine and return the remaining load."""
    context, doing = stage.context, stage.doing
    deadline = time.monotonic() + patience_s
    watch = other_load if context.target is None else context.target.other_load
    while (load := watch()) > BUSY and time.monotonic() < deadline:
        context.progress(f"{doing}: waiting for an idle machine, other processes use {load:.0%}", None)
    context.progress(doing, None)
    return load


def _plan(timing: str, load: float) -> TimingPlan:
    plan = PLANS[timing]
    if load > BUSY and plan.launches > 1:
        return replace(plan, launches=plan.launches + 3, most_launches=plan.most_launches + 4)
    return plan


def as_fast(timing: Timing, load: float) -> float:
    """Return the factor within which two times count as equal."""
    if load > OVERLOADED:
        return AS_FAST_UNDER_LOAD
    return AS_FAST if timing.launches > 1 else AS_FAST_ONCE


def slow_warnings(*timings: Timing) -> list[str]:
    """Return a warning where a slow model was timed with few calls."""
    slow = [timing for timing in timings if timing.latency_ms_p50 > 1000 * SLOW_S and timing.calls]
    if not slow:
        return []
    calls = " and ".join(str(timing.calls) for timing in slow)
    took = " and ".join(f"{timing.latency_ms_p50 / 1000:.2f} s" for timing in slow)
    return [f"a call takes {took}, so the timing has few calls ({calls} in all launches)"]
