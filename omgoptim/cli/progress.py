"""Progress of a run in a terminal: a live bar, one line per stage, or a live view of all measurements."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.follow import follow, read_live
from omgoptim.render.numbers import (
    bars,
    drop_text,
    plain,
    progress_numbers,
    progress_text,
    ratio_text,
    size_text,
    stage_text,
    wait_text,
)
from omgoptim.reports import Candidate, LiveRun, RunState, Step
from omgoptim.text import plural

Show = Callable[[RunState], None]
"""Shows a new state of a run."""


def display(console: Console) -> AbstractContextManager[Show]:
    """Return the display for standard error: a live bar on a terminal, else lines."""
    return live_bar(console) if console.is_terminal else stage_lines(console)


@contextmanager
def watching(folder: RunFolder, *, lines: bool = False) -> Iterator[None]:
    """Show the progress of a run of this process on standard error, from a thread.

    Args:
        folder: of the run.
        lines: one line a stage even on a terminal, as a notebook shows best.
    """
    console = Console(file=sys.stderr, highlight=False, force_jupyter=False)
    ended = threading.Event()

    def watch_run() -> None:
        with suppress(OmgoptimError):  # the folder may be deleted meanwhile
            for state in follow(folder):
                if ended.is_set():
                    return
                show(state)

    with stage_lines(console) if lines else display(console) as show:
        watcher = threading.Thread(target=watch_run, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(timeout=2)


@contextmanager
def live_bar(console: Console) -> Iterator[Show]:
    """Show stage, bar, percent and remaining time on one line, removed when the run ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, numbers="")

        def show(state: RunState) -> None:
            total, done = (None, None) if state.progress is None else (1.0, state.progress)
            shown = ", ".join(progress_numbers(state))
            progress.update(task, description=stage_text(state), total=total, completed=done, numbers=shown)

        yield show


@contextmanager
def stage_lines(console: Console) -> Iterator[Show]:
    """Print one line whenever the stage changes; what follows a colon in it is a detail that may change often."""
    last: str | None = None

    def show(state: RunState) -> None:
        nonlocal last
        stage = state.stage.partition(": ")[0]
        if stage != last and state.status in ("starting", "queued", "running"):
            last = stage
            console.print(progress_text(state), markup=False, highlight=False, soft_wrap=True)

    yield show


MAX_STAGES, MAX_RECORDS, MAX_BARS = 10, 10, 40
"""Maximum stages, records and bars that fit a terminal."""

_STYLE = {"kept": "green", "rolled_back": "yellow", "failed": "red"}


def watch(folder: RunFolder, console: Console) -> bool:
    """Show a run until it ends, and return True; False if the user stopped watching; the run continues.

    A terminal shows a live view; elsewhere it is one line a stage.
    """
    try:
        with live_display(console, folder) if console.is_terminal else stage_lines(console) as show:
            for state in follow(folder):
                show(state)
    except KeyboardInterrupt:
        console.print(f"run {folder.id} continues: omgoptim runs watch {folder.id}", markup=False, soft_wrap=True)
        return False
    return True


@contextmanager
def live_display(console: Console, folder: RunFolder) -> Iterator[Show]:
    """Show a run on a terminal, drawn once a second from its folder and removed when the run ends."""
    with Live(
        console=console, get_renderable=lambda: live_view(read_live(folder)), refresh_per_second=1, transient=True
    ) as live:
        yield lambda _state: live.refresh()


def live_view(run: LiveRun) -> RenderableType:
    """Return the live view of a run in progress."""
    state = run.state
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(1.0, state.progress or 0.0, width=40), Text(", ".join(progress_numbers(state))))
    parts: list[RenderableType] = [
        Text.assemble((state.run_id, "bold"), f"  {plain(state.model, 60)}  ", (state.status, "cyan")),
        bar,
        _stages(run),
    ]
    if records := run.steps or run.candidates:
        parts.append(_records(records))
    for name in ("loss", "quality"):
        values = [value for epoch in run.epochs if (value := getattr(epoch, name)) is not None and math.isfinite(value)]
        parts += [Text(f"{name:<8}{curve_text(values)}")] if values else []
    return Group(*parts, Text("Ctrl-C stops watching; the run continues", "dim"))


def curve_text(values: Sequence[float]) -> str:
    """`▇▅▃▁ 1.21 -> 0.31, 4 epochs`: evenly spread epochs on one scale, the last among them."""
    count = min(len(values), MAX_BARS)
    shown = [values[round(place * (len(values) - 1) / max(1, count - 1))] for place in range(count)]
    low, high = min(values), max(values)
    drawn = bars([(value - low) / (high - low) if high > low else 0.0 for value in shown])
    epochs = "1 epoch" if len(values) == 1 else f"{len(values)} epochs"
    return f"{drawn} {values[0]:.3g} -> {values[-1]:.3g}, {epochs}"


def _stages(run: LiveRun) -> RenderableType:
    """Return the last stages with their times, then the current one with its detail."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    now = stage_text(run.state)
    others = [stage for stage in run.stages if stage.name != now.partition(": ")[0]]
    earlier = others[:-MAX_STAGES]
    if earlier:
        spent = wait_text(sum(stage.seconds for stage in earlier))
        table.add_row(Text(spent, "dim"), Text(plural(len(earlier), "earlier stage"), "dim"))
    for stage in others[-MAX_STAGES:]:
        table.add_row(Text(f"{stage.seconds:.1f} s", "dim"), Text(plain(stage.name, 100)))
    seconds = sum(stage.seconds for stage in run.stages if stage not in others)
    table.add_row(Text(f"{seconds:.1f} s", "cyan"), Text(now, "bold"))
    return table


def _records(records: Sequence[Candidate | Step]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("measured so far", "status", "speedup", "size", "drop"):
        table.add_column(header, justify="left" if header in ("measured so far", "status") else "right")
    for one in records[-MAX_RECORDS:]:
        table.add_row(
            Text(plain(one.name, 60)),
            Text(
                plain(one.why, 40) if one.status == "planned" else one.status.replace("_", " "),
                _STYLE.get(one.status, ""),
            ),
            Text("" if one.speedup is None else ratio_text(one.speedup)),
            Text("" if one.size_bytes is None else size_text(one.size_bytes)),
            Text("" if one.quality_drop is None else drop_text(one.quality_drop)),
        )
    return table
