"""The steps of a run that reaches for a goal, each an ordinary run."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class Step(Record):
    """One step: what it was, what was expected of it and what it brought, and whether the result builds on it."""

    name: str
    """Such as `quantize` or `prune 50%`."""
    verb: str
    run_id: str | None = None
    """The run that did it: `runs show` has its report."""
    parent: str | None = None
    """Name of the step that it started from; null where that is the original."""
    status: Literal["kept", "rolled_back", "failed", "planned", "skipped"]
    why: str = ""
    seconds: float | None = None
    expected_seconds: float | None = None
    """Of a planned step: from one measured launch and one measured training batch."""
    expected_speedup: float | None = None
    """Against the original, before the step was taken."""
    speedup: float | None = None
    """Latency of the original over that of the step's artifact: from one launch, the product along the chain."""
    size_bytes: int | None = None
    quality: float | None = None
    quality_drop: float | None = None
    """Against the original, on the selection samples; never on the evaluation data."""
    on_front: bool = False
    """True if the step is on the Pareto front of speed, size and quality drop."""
