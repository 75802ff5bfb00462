"""Alternatives to a run's artifact, and the parts of a gain."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class Gain(Record):
    """One factor of a gain. Low and high are the ends of a 95 % interval over launches."""

    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    size_ratio: float | None = None


class GainsBy(Record):
    """A gain as the product of two factors."""

    engine: Gain
    """Gain of the float32 model on the artifact's engine over the original."""
    precision: Gain
    """Gain of the artifact over the float32 model on the same engine: the effect of fewer bits."""


class Alternative(Record):
    """Another finalist, measured in the same race and kept: `pick` selects it without computing again."""

    name: str
    """Name that `pick` takes."""
    candidate: str
    runtime: str
    precision: str
    best_for: list[Literal["speed", "size", "quality"]] = []
    """Properties in which it is the best of all finalists that pass the quality guard."""
    size_bytes: int | None = None
    size_ratio: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    quality: float | None = None
    """Quality on the evaluation data."""
    quality_drop: float | None = None
    holds: bool
    """Whether it passes the quality guard on the evaluation data."""
    path: str
    command: str
    """The call that selects it."""
