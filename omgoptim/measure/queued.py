"""Run-queue time of this process: distinguishes a busy machine from a model that sleeps."""

from __future__ import annotations

from pathlib import Path

TASKS = Path("/proc/self/task")
"""A folder per thread, on Linux."""


def queued_s(tasks: Path = TASKS) -> float | None:
    """Return the seconds for which threads of this process wanted to run and had no core; None where the system does
    not tell.

    Source: Documentation/scheduler/sched-stats.rst of Linux: the second number of `schedstat`, in nanoseconds.
    """
    found = []
    for task in tasks.glob("*/schedstat"):
        try:
            ran, queued, *_ = task.read_text().split()
        except (OSError, ValueError):  # a thread that ended meanwhile
            continue
        found.append((int(ran), int(queued)))
    if not any(ran or queued for ran, queued in found):  # a kernel that does not count
        return None
    return sum(queued for _, queued in found) / 1e9
