"""What else a run made, and what each part of a gain comes from."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class Gain(Record):
    """One part of a gain. Low and high are the ends of a 95 % interval over launches."""

    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    size_ratio: float | None = None


class GainsBy(Record):
    """A gain in two parts that multiply to it."""

    engine: Gain
    """The float32 model on the artifact's engine against the original."""
    precision: Gain
    """The artifact against the float32 model on the same engine: what fewer bits bring."""


class Alternative(Record):
    """Another finalist, measured in the same race and kept: `pick` delivers it without computing again."""

    name: str
    """Name that `pick` takes."""
    candidate: str
    runtime: str
    precision: str
    best_for: list[Literal["speed", "size", "quality"]] = []
    """What it is the best in, of all finalists that hold the guard."""
    size_bytes: int | None = None
    size_ratio: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    quality: float | None = None
    """On the evaluation data."""
    quality_drop: float | None = None
    holds: bool
    """Whether it holds the guard on the evaluation data."""
    path: str
    command: str
    """The call that delivers it."""
