"""The goal of a run: a guard on quality, and targets for latency, size and memory."""

from __future__ import annotations

from dataclasses import dataclass

from omgoptim.reports import Measurement
from omgoptim.requests import OptimizeRequest, SearchRequest

MB = 1_000_000


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

    def missed(self, measured: Measurement) -> list[Missed]:
        """Return the targets that a measurement does not reach, the furthest first; what is not known is not missed."""
        sides = (
            ("latency", measured.latency_ms_p50, self.latency_ms, 1.0, "ms"),
            ("size", measured.size_bytes, self.size_bytes, MB, "MB"),
            ("peak memory", measured.peak_memory_bytes, self.memory_bytes, MB, "MB"),
        )
        missed = [
            Missed(name, value / scale, target / scale, unit)
            for name, value, target, scale, unit in sides
            if value is not None and target is not None and value > target
        ]
        return sorted(missed, key=lambda one: -one.factor)
