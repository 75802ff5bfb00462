"""Steps of a run with a goal, each an ordinary run."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class Step(Record):
    """One step: its call, expected and measured effect, and whether the result builds on it."""

    name: str
    """Such as `quantize` or `prune 50%`."""
    verb: str
    run_id: str | None = None
    """Run of the step: `runs show` has its report."""
    parent: str | None = None
    """Name of the step whose artifact it starts from; null for the original."""
    status: Literal["kept", "rolled_back", "failed", "planned", "skipped"]
    why: str = ""
    seconds: float | None = None
    expected_seconds: float | None = None
    """Estimated seconds of a planned step, from one measured launch and one measured training batch."""
    expected_speedup: float | None = None
    """Expected speedup over the original."""
    speedup: float | None = None
    """Latency of the original over that of the step's artifact: from one launch, the product along the chain."""
    size_bytes: int | None = None
    quality: float | None = None
    quality_drop: float | None = None
    """Quality drop against the original, on the selection samples; never on the evaluation data."""
    on_front: bool = False
    """True if the step is on the Pareto front of speed, size and quality drop."""
