"""Numbers and foreign text as every form of a report writes them: units, digits, one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from omgoptim.reports import RunState
from omgoptim.text import clean, clean_block

T = TypeVar("T")

SAME = 0.005
"""A ratio nearer to 1 than this is written as no change. Chosen: ratios have two decimals."""

BARS = "▁▂▃▄▅▆▇█"


def plain(text: str, limit: int = 400) -> str:
    """Text of a model, a log or a library on one line: no control or invisible characters, and bounded."""
    return clean(text, limit)


def block(text: str, limit: int = 2000) -> str:
    """Return text like `plain`, with its line breaks: for logs and code."""
    return clean_block(text, limit)


def progress_text(state: RunState) -> str:
    """Return `measuring, 40%, 12 s left`."""
    return ", ".join([stage_text(state), *progress_numbers(state)])


def state_text(state: RunState) -> str:
    """Return how a run ended, or its stage and progress."""
    return state.summary or (state.error or {}).get("what", "") or progress_text(state)


def stage_text(state: RunState) -> str:
    """Return the stage of a run, else its status."""
    return plain(state.stage or state.status, 120)


def progress_numbers(state: RunState) -> list[str]:
    """Return percent done and time left, as far as they are known."""
    done = [] if state.progress is None else [f"{state.progress:.0%}"]
    left = left_text(state)
    return [*done, left] if left else done


def left_text(state: RunState) -> str:
    """Return `12 s left`, of a queued run without its wait, which nobody knows; empty without an estimate."""
    if state.eta_s is None:
        return ""
    return f"{wait_text(state.eta_s)} left{' after the wait' if state.status == 'queued' else ''}"


def if_known(show: Callable[[T], str], value: T | None) -> str:
    """Return the text of a number; empty where it was not measured."""
    return "" if value is None else show(value)


def size_text(size: int) -> str:
    """Bytes in decimal units: 1 MB is 1,000,000 bytes."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: int) -> str:
    """Return a count with three digits and k, M, G or T."""
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def time_text(ms: float) -> str:
    """Return a duration given in milliseconds."""
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.1f} ms" if ms >= 100 else f"{ms:.3g} ms"


def wait_text(seconds: float) -> str:
    """Return a duration in seconds or minutes."""
    rounded = max(0, round(seconds))
    return f"{rounded} s" if rounded < 90 else f"{round(rounded / 60)} min"


def ratio_text(ratio: float) -> str:
    """Format a ratio: two decimals below 10, else one."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def drop_text(drop: float) -> str:
    """Return a drop with four digits; one that rounds to nothing has no sign."""
    return f"{round(drop, 4) or 0.0:.4f}"


def amount_text(amount: float | None) -> str:
    """Return a fraction as `90%`; empty where no amount is the goal."""
    return "" if amount is None else f"{100 * amount:.3g}%"


def quality_text(quality: float | None) -> str:
    """Return a quality with four digits; empty where it was not measured."""
    return "" if quality is None else f"{quality:.4f}"


def path_text(path: str, limit: int = 80) -> str:
    """Return the path of a layer; the empty path is the model's own."""
    return plain(path, limit) or "the model itself"


def paths_text(paths: Sequence[str], most: int = 4) -> str:
    """Return the first few paths, and how many more there are."""
    shown = ", ".join(path_text(path, 60) for path in paths[:most])
    return f"{shown} and {len(paths) - most} more" if len(paths) > most else shown


def bars(fractions: Sequence[float]) -> str:
    """One bar for each fraction in 0..1; values outside are clipped."""
    steps = (max(0.0, min(1.0, fraction)) for fraction in fractions)
    return "".join(BARS[round(step * (len(BARS) - 1))] for step in steps)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {units[-1]}"
