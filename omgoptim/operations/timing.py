"""The full measurement, with an eye on who else uses the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.hardware import LoadMeter, other_load
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.timing import PLANS, SLOW_S, Timing, TimingPlan, TimingSetup, time_artifacts
from omgoptim.operations.context import RunContext

BUSY = 0.25
"""Load by other processes, as a fraction of the machine, above which more launches are made and the report warns."""

OVERLOADED = 0.45
"""Load above which no ratio of times is told at all: thread pools that wait for a core are not slower models."""

AS_FAST, AS_FAST_ONCE, AS_FAST_UNDER_LOAD = 1.02, 1.1, 1.25
"""Contestants within this factor count as equally fast: over several launches, in a single one, on a busy machine."""

PATIENCE_S = {"quick": 0.0, "standard": 20.0, "careful": 60.0}
"""How long a run waits for a busy machine to become quiet, by timing."""


@dataclass(frozen=True, slots=True)
class Raced:
    """What a full measurement gave, and how busy the machine was (the worse of before and during)."""

    timings: list[Timing | OmgoptimError]
    load: float

    def timing(self, index: int) -> Timing:
        """One contestant's timing.

        Raises:
            OmgoptimError: the one that ended its race.
        """
        found = self.timings[index]
        if isinstance(found, OmgoptimError):
            raise found
        return found


def full_race(
    artifacts: Sequence[Path],
    bench: TimingSetup,
    timing: str,
    seed: int,
    context: RunContext,
    span: tuple[float, float],
    doing: str,
    on_first: Callable[[int, MeasuringProcess], None] | None = None,
) -> Raced:
    """Time artifacts against the first of them, once the machine is quiet or patience is out.

    Args:
        timing: quick, standard or careful.
        span: fractions of the whole run between which progress moves.
        doing: what the progress says.
    """
    start, end = span
    with context.measuring():
        load = _quiet(context, doing, PATIENCE_S[timing])
        meter = LoadMeter()
        timings = time_artifacts(
            artifacts,
            bench,
            _plan(timing, load),
            seed,
            lambda done: context.progress(doing, start + (end - start) * done),
            on_first,
        )
        return Raced(timings, max(load, meter.load()))


def told(context: RunContext, doing: str) -> Callable[[float], None]:
    """Progress within a part of a run whose share of the whole is not known."""
    return lambda done: context.progress(f"{doing}: {done:.0%}", None)


def _quiet(context: RunContext, doing: str, patience_s: float) -> float:
    """Wait for other processes to let go of the machine; the load that is left."""
    deadline = time.monotonic() + patience_s
    while (load := other_load()) > BUSY and time.monotonic() < deadline:
        context.progress(f"{doing}: waiting for a quiet machine, others use {load:.0%} of it", None)
    context.progress(doing, None)
    return load


def _plan(timing: str, load: float) -> TimingPlan:
    plan = PLANS[timing]
    if load > BUSY and plan.launches > 1:
        return replace(plan, launches=plan.launches + 3, most_launches=plan.most_launches + 4)
    return plan


def as_fast(timing: Timing, load: float) -> float:
    """How much slower than another one may have been measured, as a factor, and still count as equally fast."""
    if load > OVERLOADED:
        return AS_FAST_UNDER_LOAD
    return AS_FAST if timing.launches > 1 else AS_FAST_ONCE


def slow_warnings(*timings: Timing) -> list[str]:
    """That a slow model was timed by few calls."""
    slow = [timing for timing in timings if timing.latency_ms_p50 > 1000 * SLOW_S and timing.calls]
    if not slow:
        return []
    calls = " and ".join(str(timing.calls) for timing in slow)
    took = " and ".join(f"{timing.latency_ms_p50 / 1000:.2f} s" for timing in slow)
    return [f"a call takes {took}, so its time comes from few calls ({calls} in all launches)"]
