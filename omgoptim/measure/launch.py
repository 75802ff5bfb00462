"""A launch of a timing: each artifact in a process of its own, in alternating turns. No torch, no pydantic.

It is all that runs on a target (`measure/target`), with the processes that it starts.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup

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


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """Times of one artifact in one launch, in seconds."""

    p50: float
    p90: float
    log_ratio: float
    """Median over the rounds of the log of the first artifact's time over this one's."""
    calls: int
    idle: list[float]
    reopened: list[float]
    throughput_p50: float | None = None
    log_throughput: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LaunchParts:
    """Quantities that a launch measures beside the latency."""

    throughput: bool
    memory: bool


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of a timing, on this machine or on a target."""

    artifacts: Sequence[Path]
    """Folders; the first is the reference."""
    setup: TimingSetup
    plan: TimingPlan
    seed: str
    """Seed of the order of turns."""
    parts: LaunchParts
    on_open: Callable[[int, MeasuringProcess], None] | None = None
    """Called with each artifact's index and process after its timing."""
    progress: Callable[[float], None] = lambda _: None
    """Called between the rounds of turns on this machine, with the fraction of them that is done."""


@dataclass(slots=True, eq=False)
class _Entry:
    """An artifact of a launch."""

    artifact: Path
    process: Any = None
    error: OmgoptimError | None = None
    reopened: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


@dataclass(slots=True)
class _Running:
    """State of a launch: an artifact that fails is left out with its error; the failure of the first is raised."""

    plan: TimingPlan
    order: random.Random
    entries: list[_Entry]

    @property
    def active(self) -> list[_Entry]:
        return [entry for entry in self.entries if entry.error is None]

    def each(self, action: Callable[[_Entry], object], shuffled: bool = False) -> None:
        active = self.active
        for entry in self.order.sample(active, len(active)) if shuffled else active:
            try:
                action(entry)
            except OmgoptimError as error:
                if entry is self.entries[0]:
                    raise
                entry.error = error


def run_launch(launch: Launch) -> list[LaunchResult | OmgoptimError]:
    """Time the artifacts of a launch against the first of them in fresh processes of this machine.

    Raises:
        OmgoptimError: the first artifact fails.
    """
    plan, parts = launch.plan, launch.parts
    run = _Running(plan, random.Random(launch.seed), [_Entry(path) for path in launch.artifacts])
    names = (LATENCY, THROUGHPUT) if parts.throughput else (LATENCY,)
    batches = {name: launch.setup.batches[name] for name in names}
    with ExitStack() as stack:
        for place in run.order.sample(range(len(run.entries)), len(run.entries)):
            entry = run.entries[place]
            entry.process = stack.enter_context(launch.setup.lend(place, entry.artifact, batches))
            entry.process.begin_open()
        run.each(_end_open)
        with launch.setup.hold():
            share = 0.5 if parts.throughput else 1.0
            latency = _turns(run, LATENCY, plan.rounds, lambda done: launch.progress(share * done))
            throughput: Turns = {}
            if parts.throughput:
                rounds = plan.throughput_rounds
                throughput = _turns(run, THROUGHPUT, rounds, lambda done: launch.progress(share + share * done))
            if parts.memory:
                run.each(_read_peak)
            if on_open := launch.on_open:
                run.each(lambda entry: on_open(run.entries.index(entry), entry.process))
    return [entry.error or _result(run, entry, latency, throughput) for entry in run.entries]


Turns = dict[int, list[dict[str, Any]]]
"""Answers of the turns of each artifact, by the id of its entry."""


def _turns(run: _Running, batch: str, rounds: int, progress: Callable[[float], None]) -> Turns:
    """Time every artifact round by round, each round in a new random order; report the fraction that is done."""
    turns: Turns = {id(entry): [] for entry in run.active}
    lengths: dict[int, float] = {}

    def warm(entry: _Entry) -> None:
        call_s = entry.process.ask("warm", batch=batch)["call_s"]
        lengths[id(entry)] = max(run.plan.turn_s, (4 if call_s < SLOW_S else 1) * call_s)

    def turn(entry: _Entry) -> None:
        answer = entry.process.ask("turn", batch=batch, seconds=lengths[id(entry)])
        turns[id(entry)].append(answer)

    run.each(warm)
    very_slow = max(lengths.values(), default=0.0) > VERY_SLOW_S
    rounds = 1 if batch == THROUGHPUT and very_slow else rounds
    for done in range(1, rounds + 1):
        run.each(turn, shuffled=True)
        progress(done / (rounds + 1))
    return turns


def _end_open(entry: _Entry) -> None:
    entry.reopened = entry.process.end_open()["differences"]


def _read_peak(entry: _Entry) -> None:
    entry.peak_bytes = entry.process.ask("memory")["peak_bytes"] or None


def _result(run: _Running, entry: _Entry, latency: Turns, throughput: Turns) -> LaunchResult:
    first, turns, samples = id(run.entries[0]), latency[id(entry)], throughput.get(id(entry))
    return LaunchResult(
        p50=statistics.median(turn["p50"] for turn in turns),
        p90=statistics.median(turn["p90"] for turn in turns),
        log_ratio=_median_log_ratio(latency[first], turns),
        calls=sum(turn.get("calls", 0) for turn in turns),
        idle=[turn["idle"] for turn in turns if turn.get("idle") is not None],
        reopened=entry.reopened,
        throughput_p50=statistics.median(turn["p50"] for turn in samples) if samples else None,
        log_throughput=_median_log_ratio(throughput[first], samples) if samples else None,
        peak_bytes=entry.peak_bytes,
    )


def _median_log_ratio(reference: list[dict[str, Any]], turns: list[dict[str, Any]]) -> float:
    return statistics.median(math.log(a["p50"] / b["p50"]) for a, b in zip(reference, turns, strict=True))
