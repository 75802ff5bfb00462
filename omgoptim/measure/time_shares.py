"""Shares of a call's time by kind of layer and compute dtype, and Amdahl's bound of the speedup."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from omgoptim.reports import TimeShare

if TYPE_CHECKING:
    from omgoptim.measure.measuring_process import MeasuringProcess


def query_time_shares(process: MeasuringProcess, batch: str) -> list[TimeShare]:
    """Return the time shares of the artifact in a measuring process, the costliest kind first.

    Args:
        process: the process, its artifact opened. A program is called in a second session with profiling on.
        batch: name of the prepared batch.

    Returns:
        None if the engine does not report them (a GPU).
    """
    answer = process.ask("kinds", batch=batch)["kinds"]
    return time_shares((entry["kind"], entry["ms"], entry["computed_in"]) for entry in answer)


def time_shares(nodes: Iterable[tuple[str, float, str | None]]) -> list[TimeShare]:
    """Sum the time of an engine's nodes by kind: kind, ms, and compute dtype, `int8` among them."""
    spent: dict[tuple[str, bool], float] = defaultdict(float)
    for kind, ms, numbers in nodes:
        spent[kind, numbers == "int8"] += ms
    whole = sum(spent.values())
    return [
        TimeShare(kind=kind, time_ms=ms, share=ms / whole, quantized=quantized)
        for (kind, quantized), ms in sorted(spent.items(), key=lambda entry: -entry[1])
        if whole > 0
    ]


def speedup_bound(times: Sequence[TimeShare]) -> float | None:
    """Return Amdahl's bound: total time over the time not spent in integers. None if it does not apply."""
    integers = sum(time.share for time in times if time.quantized)
    return 1 / (1 - integers) if 0 < integers < 1 - 1e-9 else None
