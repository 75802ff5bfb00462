"""The goal of a run: a guard on quality, and targets for latency, size and memory."""

from __future__ import annotations

from dataclasses import dataclass

from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Measurement
from omgoptim.requests import OptimizeRequest, PruneRequest, SearchRequest

MB = 1_000_000
"""Bytes of a megabyte: decimal, as in all reports."""


def time_target(request: object) -> str | None:
    """Return a request's target for latency or speedup in words; None without one."""
    asked = request.method if isinstance(request, PruneRequest) else request
    latency_ms: float | None = getattr(asked, "target_latency_ms", None)
    speedup: float | None = getattr(asked, "target_speedup", None)
    if latency_ms is not None:
        return f"a latency of {latency_ms:g} ms"
    return f"a speedup of {speedup:g}x" if speedup is not None else None


@dataclass(frozen=True, slots=True)
class Missed:
    """A target that a measurement does not reach."""

    name: str
    measured: float
    target: float
    unit: str

    @property
    def factor(self) -> float:
        """Measured over target, above 1."""
        return self.measured / self.target

    def __str__(self) -> str:
        return f"{self.name} {self.measured:.3g} {self.unit}, target {self.target:.3g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Goal:
    """Quality guard and targets of a run; None without a target."""

    max_quality_drop: float
    latency_ms: float | None = None
    size_bytes: float | None = None
    memory_bytes: float | None = None

    @staticmethod
    def of(request: OptimizeRequest | SearchRequest) -> Goal:
        """Return the goal of a request."""
        size, memory = request.target_size_mb, request.target_memory_mb
        return Goal(
            request.max_quality_drop,
            request.target_latency_ms,
            None if size is None else size * MB,
            None if memory is None else memory * MB,
        )

    def missed(self, measured: Measurement, load: float) -> list[Missed]:
        """Return the targets that a measurement does not reach, the furthest first.

        What is not known is not missed; the latency is not known where the machine was overloaded.

        Args:
            measured: size, latency and memory of an artifact.
            load: share of the machine that other processes used while it was timed.
        """
        latency_ms = measured.latency_ms_p50 if load <= OVERLOADED else None
        sides = (
            ("latency", latency_ms, self.latency_ms, 1.0, "ms"),
            ("size", measured.size_bytes, self.size_bytes, MB, "MB"),
            ("peak memory", measured.peak_memory_bytes, self.memory_bytes, MB, "MB"),
        )
        missed = [
            Missed(name, value / scale, target / scale, unit)
            for name, value, target, scale, unit in sides
            if value is not None and target is not None and value > target
        ]
        return sorted(missed, key=lambda one: -one.factor)
