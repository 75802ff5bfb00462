"""Artifacts made by the steps, with speed, size and quality drop, and their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omgoptim.operations.context import StepRun
from omgoptim.operations.goal import Goal
from omgoptim.reports import Measurement


@dataclass(slots=True, eq=False)
class StepResult:
    """Artifact of a step, with its measurements on the selection samples."""

    name: str
    verb: str
    run: StepRun
    artifact: Path
    parent: StepResult | None
    speedup: float | None
    """Latency of the original over this one's, from single launches; None where the machine was too busy to tell."""
    work_ratio: float
    """MACs of the original over this one's: what is compared where a speedup is not known."""
    size_bytes: int
    quality: float
    drop: float
    """Quality of the original less this one's."""
    cautious_drop: float
    """The drop with a margin for what so many samples cannot tell."""
    seconds: float
    expected_speedup: float | None = None
    status: Literal["kept", "rolled_back"] = "rolled_back"
    why: str = ""
    ruined: bool = False
    """An output is ruined that the metric does not show; the cautious drop is then above any guard."""
    measured: Measurement | None = None
    """By a single launch."""

    @property
    def chain(self) -> list[StepResult]:
        """The points it was made from, the first step first, itself last."""
        return [*(self.parent.chain if self.parent else []), self]

    def overshoot(self, goal: Goal) -> float:
        """Return measured over target of the target that is missed furthest; 1 if none is."""
        if self.measured is None:
            return 1.0
        missed = goal.missed(self.measured, 0.0 if self.speedup is not None else 1.0)
        return missed[0].factor if missed else 1.0

    @property
    def quantized_alone(self) -> bool:
        """True if it is the original, quantized."""
        return self.verb == "quantize" and self.parent is None


def speeds(points: Sequence[StepResult]) -> list[float]:
    """Return how fast points are against the original: measured, or their work where one could not be measured."""
    measured = [point.speedup for point in points if point.speedup is not None]
    return measured if len(measured) == len(points) else [point.work_ratio for point in points]


def pareto_points(points: Sequence[StepResult]) -> list[StepResult]:
    """Return the points that no other beats or equals in speed, size and drop at once; of equal ones the first."""
    costs = [(-s, p.size_bytes, p.drop) for s, p in zip(speeds(points), points, strict=True)]
    front = []
    for index, point in enumerate(points):
        mine = costs[index]
        beaten = any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and (other != mine or place < index)
            for place, other in enumerate(costs)
            if place != index
        )
        if not beaten:
            front.append(point)
    return front


def product(parent: float | None, own: float | None) -> float | None:
    """Return the speedup along a chain; None where one of the two is not known."""
    return None if parent is None or own is None else parent * own
