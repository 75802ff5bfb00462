"""Paired timing of artifacts: each in a process of its own, in alternating turns, over several launches.

The unit is the launch. Within one, the artifacts take turns of at least 0.1 s in random order, one running at a time;
a launch gives one number, the median log ratio of its rounds. The interval is Student's t over launches, because the
same model's time moves by tens of percent from one process to the next and is stable within a process.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.models.security.path_policy import PathPolicy

# fmt: off
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)
# fmt: on
"""97.5 % quantile of Student's t for 1, 2, … 29 degrees of freedom."""

FAR_FROM_ONE = 3
"""An interval this many half-widths away from 1 decides without being narrow."""

SLOW_S, VERY_SLOW_S = 0.1, 1.0
"""Seconds a call above which a turn has two calls, one of them counted; and above which throughput is measured once."""

LATENCY, THROUGHPUT = "latency", "throughput"


@dataclass(frozen=True, slots=True)
class TimingPlan:
    """Number of launches, rounds and turns."""

    launches: int
    most_launches: int
    rounds: int
    turn_s: float = 0.12
    throughput_launches: int = 2
    throughput_rounds: int = 2
    narrow: float = 0.03
    """Half-width of a ratio's interval, in log units, that needs no more launches."""
    limit_s: float = math.inf
    """Seconds within which the launches after the second must end."""


PLANS = {
    "quick": TimingPlan(launches=1, most_launches=1, rounds=4, throughput_launches=1),
    "standard": TimingPlan(launches=5, most_launches=8, rounds=4),
    "careful": TimingPlan(launches=8, most_launches=24, rounds=6, narrow=0.015),
}
"""Plan of each value of the request's `timing`."""
SCREENING_PLAN = TimingPlan(launches=1, most_launches=1, rounds=2, throughput_launches=0)
"""Plan for candidates before the final timing."""


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


@dataclass(frozen=True, slots=True)
class TimingSetup:
    """Inputs, threads and project of a timing."""

    batches: Mapping[str, Path]
    """.npz files under the names `latency` (batch 1) and `throughput`; without the second, throughput is not timed."""
    batch: int
    threads: int
    cwd: Path
    device: str | None = None
    policy: PathPolicy | None = None
    """Policy for the code of the artifacts' recipes; None: the project only."""


@dataclass(slots=True, eq=False)
class _TimedArtifact:
    """One artifact and the results of its launches."""

    artifact: Path
    process: Any = None
    error: OmgoptimError | None = None
    p50: list[float] = field(default_factory=list)
    p90: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    log_throughput: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    calls: int = 0
    reopened: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _TimingRun:
    """State of a timing: an artifact that fails is left out with its error; the failure of the first is raised."""

    setup: TimingSetup
    plan: TimingPlan
    order: random.Random
    entries: list[_TimedArtifact]

    @property
    def first(self) -> _TimedArtifact:
        return self.entries[0]

    @property
    def active(self) -> list[_TimedArtifact]:
        return [entry for entry in self.entries if entry.error is None]

    def each(self, action: Callable[[_TimedArtifact], object], shuffled: bool = False) -> None:
        active = self.active
        for entry in self.order.sample(active, len(active)) if shuffled else active:
            try:
                action(entry)
            except OmgoptimError as error:
                if entry is self.first:
                    raise
                entry.error = error


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
        setup: inputs, threads, project.
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
    run = _TimingRun(setup, plan, random.Random(seed), [_TimedArtifact(path) for path in artifacts])
    began = time.monotonic()
    launch = 0
    while True:
        _launch(run, launch, on_first if launch == 0 else None)
        launch += 1
        progress(min(1.0, launch / plan.launches))
        over = launch >= 2 and (time.monotonic() - began) * (launch + 1) / launch > plan.limit_s
        if over or has_converged([candidate.log_ratios for candidate in run.active[1:]], launch, plan):
            return [c.error or _timing(c, first=index == 0) for index, c in enumerate(run.entries)]


def _launch(run: _TimingRun, launch: int, on_first: Callable[[int, MeasuringProcess], None] | None) -> None:
    plan, order = run.plan, run.order
    slowest = max((run.setup.batch / rate for c in run.active for rate in c.per_s), default=0.0)
    more = launch < plan.throughput_launches and slowest <= VERY_SLOW_S
    with_throughput = more and THROUGHPUT in run.setup.batches
    batches = {name: run.setup.batches[name] for name in ((LATENCY, THROUGHPUT) if with_throughput else (LATENCY,))}
    with ExitStack() as stack:
        for entry in order.sample(run.active, len(run.active)):
            setup = run.setup
            process = MeasuringProcess(
                entry.artifact,
                threads=setup.threads,
                batches=batches,
                cwd=setup.cwd,
                device=setup.device,
                policy=setup.policy,
            )
            entry.process = stack.enter_context(process)
            process.begin_open()
        run.each(_end_open)
        latency = _turns(run, LATENCY, plan.rounds)
        for entry in run.active:
            turns = latency[id(entry)]
            entry.p50.append(statistics.median(turn["p50"] for turn in turns))
            entry.p90.append(statistics.median(turn["p90"] for turn in turns))
            entry.idle += [turn["idle"] for turn in turns if turn.get("idle") is not None]
            entry.calls += sum(turn.get("calls", 0) for turn in turns)
            entry.log_ratios.append(_median_log_ratio(latency[id(run.first)], turns))
        if with_throughput:
            throughput = _turns(run, THROUGHPUT, plan.throughput_rounds)
            for entry in run.active:
                turns = throughput[id(entry)]
                entry.per_s.append(run.setup.batch / statistics.median(turn["p50"] for turn in turns))
                entry.log_throughput.append(_median_log_ratio(throughput[id(run.first)], turns))
        if more:
            run.each(_read_peak)
        if on_first:
            run.each(lambda c: on_first(run.entries.index(c), c.process))


def _turns(run: _TimingRun, batch: str, rounds: int) -> dict[int, list[dict[str, Any]]]:
    """Time every artifact round by round, each round in a new random order."""
    turns: dict[int, list[dict[str, Any]]] = {id(entry): [] for entry in run.active}
    lengths: dict[int, float] = {}

    def warm(entry: _TimedArtifact) -> None:
        call_s = entry.process.ask("warm", batch=batch)["call_s"]
        lengths[id(entry)] = max(run.plan.turn_s, (4 if call_s < SLOW_S else 1) * call_s)

    def turn(entry: _TimedArtifact) -> None:
        answer = entry.process.ask("turn", batch=batch, seconds=lengths[id(entry)])
        turns[id(entry)].append(answer)

    run.each(warm)
    very_slow = max(lengths.values(), default=0.0) > VERY_SLOW_S
    for _ in range(1 if batch == THROUGHPUT and very_slow else rounds):
        run.each(turn, shuffled=True)
    return turns


def _end_open(entry: _TimedArtifact) -> None:
    differences = entry.process.end_open()["differences"]
    before = entry.reopened or differences
    entry.reopened = [max(pair) for pair in zip(before, differences, strict=True)]


def _read_peak(entry: _TimedArtifact) -> None:
    peak = entry.process.ask("memory")["peak_bytes"]
    if peak:
        entry.peak.append(peak)


def _median_log_ratio(reference: list[dict[str, Any]], turns: list[dict[str, Any]]) -> float:
    return statistics.median(math.log(a["p50"] / b["p50"]) for a, b in zip(reference, turns, strict=True))


def has_converged(log_ratios: Sequence[Sequence[float]], launches: int, plan: TimingPlan) -> bool:
    """Return whether to stop: at the plan's last launch, or once every interval is narrow enough.

    An interval is narrow enough at the plan's half-width, or so far from 1 that the width does not matter. Stopping as
    soon as an interval excludes 1 would inflate the false positive rate; the width is independent of the side.

    Args:
        log_ratios: per candidate, one log ratio per launch.
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


def _timing(record: _TimedArtifact, first: bool) -> Timing:
    centre, half = t_interval(record.log_ratios)
    bounded = math.isfinite(half)
    speedup = Ratio(
        math.exp(centre), math.exp(centre - half) if bounded else None, math.exp(centre + half) if bounded else None
    )
    return Timing(
        latency_ms_p50=statistics.median(record.p50) * 1000,
        latency_ms_p90=statistics.median(record.p90) * 1000,
        throughput_per_s=statistics.median(record.per_s) if record.per_s else None,
        peak_memory_bytes=max(record.peak) if record.peak else None,
        speedup=None if first else speedup,
        throughput_ratio=None if first or not record.per_s else math.exp(statistics.fmean(record.log_throughput)),
        launches=len(record.p50),
        log_ratios=() if first else tuple(record.log_ratios),
        calls=record.calls or None,
        idle=statistics.median(record.idle) if record.idle else None,
        reopened=tuple(record.reopened),
    )
