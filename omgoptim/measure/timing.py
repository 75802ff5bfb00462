"""Paired timing of artifacts: each in a process of its own, in alternating turns, over several launches.

The unit is the launch. Within one, the artifacts take turns of at least 0.1 s in random order, one running at a time;
a launch gives one number, the median log ratio of its rounds. The interval is Student's t over launches, because the
same model's time moves by tens of percent from one process to the next and is stable within a process.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.launch import THROUGHPUT, VERY_SLOW_S, Launch, LaunchParts, LaunchResult, TimingPlan, run_launch
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup

# fmt: off
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)
# fmt: on
"""97.5 % quantile of Student's t for 1, 2, … 29 degrees of freedom."""

FAR_FROM_ONE = 3
"""Half-widths from 1 at which an interval decides without being narrow. Chosen: about six standard errors."""

PLANS = {
    "quick": TimingPlan(launches=1, most_launches=1, rounds=4, throughput_launches=1),
    "standard": TimingPlan(launches=5, most_launches=8, rounds=4),
    "careful": TimingPlan(launches=8, most_launches=24, rounds=6, narrow=0.015),
}
"""Plan of each value of the request's `timing`. Measured on two cores with `benchmarks/timing.py`: five launches give
about +-3 %, eight find a slowdown of 5 % in 94 % of trials."""
SCREENING_PLAN = TimingPlan(launches=1, most_launches=1, rounds=2, throughput_launches=0)
"""Plan for candidates before the final timing. Chosen: a single short launch, since finalists are timed again."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A speedup with its 95 % interval; no interval from a single launch."""

    value: float
    low: float | None
    high: float | None

    @property
    def decided(self) -> bool:
        """Return whether the interval excludes 1."""
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one artifact: medians over launches."""

    latency_ms_p50: float
    latency_ms_p90: float
    throughput_per_s: float | None
    peak_memory_bytes: int | None
    speedup: Ratio | None
    """First artifact's latency over this one's; None for the first."""
    throughput_ratio: float | None
    launches: int
    log_ratios: tuple[float, ...] = ()
    """One log ratio per launch; `speedup` is the exponential of their mean."""
    calls: int | None = None
    """Number of timed calls behind the latency."""
    idle: float | None = None
    """Share of the time in which the process neither computed nor waited for a core; None where it is not reported."""
    reopened: tuple[float, ...] = ()
    """Largest difference of each output of the opened artifact from the recorded one, relative to its scale."""


def time_artifacts(
    artifacts: Sequence[Path],
    setup: TimingSetup,
    plan: TimingPlan,
    seed: int,
    progress: Callable[[float], None] = lambda _: None,
    on_first: Callable[[int, MeasuringProcess], None] | None = None,
) -> list[Timing | OmgoptimError]:
    """Time artifacts against the first of them.

    Args:
        artifacts: at least one artifact folder; all ratios are against the first.
        setup: inputs, threads, project, and the machine to measure on.
        plan: launches, rounds and length of turns.
        seed: for the order of turns.
        progress: called with the fraction done.
        on_first: called with each artifact's index and process at the end of the first launch, after its timing, for
            further measurements in the same fresh process.

    Returns:
        A timing per artifact; for a candidate that does not open, is damaged or whose process dies, its error.

    Raises:
        OmgoptimError: the first artifact fails.
    """
    launched: list[list[LaunchResult]] = [[] for _ in artifacts]
    errors: dict[int, OmgoptimError] = {}
    run = setup.target.launch if setup.target is not None else run_launch
    began, launch = time.monotonic(), 0
    while True:
        active = [index for index in range(len(artifacts)) if index not in errors]
        more = launch < plan.throughput_launches and _slowest_s([launched[index] for index in active]) <= VERY_SLOW_S
        parts = LaunchParts(throughput=more and THROUGHPUT in setup.batches, memory=more)
        on_open = _with_indices(active, on_first) if on_first is not None and launch == 0 else None
        chosen = [artifacts[index] for index in active]
        began_at = launch / plan.launches

        def within(done: float, began_at: float = began_at) -> None:
            progress(min(1.0, began_at + done / plan.launches))

        results = run(Launch(chosen, setup, plan, f"{seed} {launch}", parts, on_open, within))
        for index, result in zip(active, results, strict=True):
            if isinstance(result, OmgoptimError):
                errors[index] = result
            else:
                launched[index].append(result)
        launch += 1
        progress(min(1.0, launch / plan.launches))
        candidates = [launched[index] for index in range(1, len(artifacts)) if index not in errors]
        over = launch >= 2 and (time.monotonic() - began) * (launch + 1) / launch > plan.limit_s
        if over or has_converged(
            [[result_of_launch.log_ratio for result_of_launch in results] for results in candidates], launch, plan
        ):
            return [
                errors.get(index) or _timing(results, setup.batch, first=index == 0)
                for index, results in enumerate(launched)
            ]


def _with_indices(
    active: Sequence[int], on_first: Callable[[int, MeasuringProcess], None]
) -> Callable[[int, MeasuringProcess], None]:
    return lambda position, process: on_first(active[position], process)


def _slowest_s(launched: Sequence[Sequence[LaunchResult]]) -> float:
    """Return the longest call with the throughput's batch so far, in seconds; 0 if there was none."""
    times = (result.throughput_p50 for results in launched for result in results)
    return max((seconds for seconds in times if seconds is not None), default=0.0)


def has_converged(log_ratios: Sequence[Sequence[float]], launches: int, plan: TimingPlan) -> bool:
    """Return whether to stop: at the plan's last launch, or once every interval is narrow enough.

    An interval is narrow enough at the plan's half-width, or so far from 1 that the width does not matter. Stopping as
    soon as an interval excludes 1 would inflate the false positive rate; the width is independent of the side.

    Args:
        log_ratios: per candidate, one log ratio per launch.
        launches: that were done.
        plan: with the wanted width and the most launches.
    """
    if launches >= plan.most_launches or launches < plan.launches:
        return launches >= plan.most_launches
    for values in log_ratios:
        centre, half = t_interval(values)
        if half > plan.narrow and abs(centre) < FAR_FROM_ONE * half:
            return False
    return True


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % interval of Student's t; infinite for a single value."""
    count = len(values)
    if count < 2:
        return statistics.fmean(values), math.inf
    quantile = T_975[min(count - 2, len(T_975) - 1)]
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count)


def _timing(launched: Sequence[LaunchResult], batch: int, first: bool) -> Timing:
    log_ratios = tuple(launch.log_ratio for launch in launched)
    centre, half = t_interval(log_ratios)
    bounded = math.isfinite(half)
    speedup = Ratio(
        math.exp(centre), math.exp(centre - half) if bounded else None, math.exp(centre + half) if bounded else None
    )
    per_s = [batch / launch.throughput_p50 for launch in launched if launch.throughput_p50 is not None]
    log_throughput = [launch.log_throughput for launch in launched if launch.log_throughput is not None]
    idle = [value for launch in launched for value in launch.idle]
    return Timing(
        latency_ms_p50=statistics.median(launch.p50 for launch in launched) * 1000,
        latency_ms_p90=statistics.median(launch.p90 for launch in launched) * 1000,
        throughput_per_s=statistics.median(per_s) if per_s else None,
        peak_memory_bytes=max((launch.peak_bytes for launch in launched if launch.peak_bytes), default=None),
        speedup=None if first else speedup,
        throughput_ratio=None if first or not per_s else math.exp(statistics.fmean(log_throughput)),
        launches=len(launched),
        log_ratios=() if first else log_ratios,
        calls=sum(launch.calls for launch in launched) or None,
        idle=statistics.median(idle) if idle else None,
        reopened=tuple(max(values) for values in zip(*(launch.reopened for launch in launched), strict=True)),
    )
