"""Watching a run in the terminal: its stages with their times, the steps that are done, and the learning curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from omgoptim.cli.progress import StageLines
from omgoptim.jobs.events import RunHistory, Stage
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.follow import follow
from omgoptim.models.security.bounded_read import read_plain
from omgoptim.render.numbers import bars, drop_text, plain, progress_numbers, ratio_text, size_text, stage_text
from omgoptim.reports import RunState

MOST_STAGES, MOST_STEPS, MOST_BARS = 12, 8, 40
_LEDGER, _LEDGER_BYTES = "ledger.jsonl", 4 * 2**20
_STYLE = {"kept": "green", "rolled_back": "yellow", "failed": "red"}


def watch(folder: RunFolder, console: Console) -> bool:
    """Show a run until it ends, and return True; False where the user stopped watching. The run goes on then.

    A terminal shows a live view; elsewhere it is one line a stage.
    """
    try:
        with LiveView(console, folder) if console.is_terminal else StageLines(console) as shown:
            for state in follow(folder):
                shown.show(state)
    except KeyboardInterrupt:
        console.print(f"run {folder.id} goes on: omgoptim runs watch {folder.id}", markup=False, soft_wrap=True)
        return False
    return True


class LiveView:
    """The display of a run on a terminal, drawn twice a second; it goes away when the run ends."""

    def __init__(self, console: Console, folder: RunFolder) -> None:
        self._history = RunHistory(folder)
        self._state: RunState | None = None
        self._live = Live(console=console, get_renderable=self._view, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, state: RunState) -> None:
        self._state = state

    def _view(self) -> RenderableType:
        if self._state is None:
            return Text("")
        return live_view(self._state, self._history.read(), steps_of(self._history.folder), time.time())


def live_view(state: RunState, history: RunHistory, steps: list[dict[str, Any]], now: float) -> RenderableType:
    """What is known of a run that goes on.

    Args:
        steps: entries of its ledger, in order.
        now: seconds since the epoch.
    """
    head = Text.assemble((state.run_id, "bold"), f"  {plain(state.model, 60)}  ", (state.status, "cyan"))
    numbers = ", ".join(progress_numbers(state))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(1.0, state.progress or 0.0, width=40), Text(numbers))
    parts: list[RenderableType] = [head, bar, _stages(history.stages, state, now)]
    if steps:
        parts.append(_steps(steps))
    if history.losses:
        parts.append(Text(f"loss  {curve_text(history.losses)}"))
    return Group(*parts, Text("Ctrl-C ends the watching, not the run", "dim"))


def curve_text(losses: list[float]) -> str:
    """`▇▅▃▁ 1.21 -> 0.31, 4 epochs`: evenly spread epochs on one scale, the last among them."""
    count = min(len(losses), MOST_BARS)
    shown = [losses[round(place * (len(losses) - 1) / max(1, count - 1))] for place in range(count)]
    low, high = min(losses), max(losses)
    drawn = bars([(loss - low) / (high - low) if high > low else 0.0 for loss in shown])
    epochs = "1 epoch" if len(losses) == 1 else f"{len(losses)} epochs"
    return f"{drawn} {losses[0]:.3g} -> {losses[-1]:.3g}, {epochs}"


def steps_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The entries of a run's ledger, if it keeps one; what cannot be read is left out."""
    found: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in read_plain(folder.path / _LEDGER, _LEDGER_BYTES).splitlines():
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                found += [entry] if isinstance(entry, dict) else []
    return found


def _stages(stages: list[Stage], state: RunState, now: float) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    earlier = len(stages) - MOST_STAGES
    if earlier > 0:
        spent = stages[-MOST_STAGES].began - stages[0].began
        table.add_row(Text(f"{spent:.1f} s", "dim"), Text(f"{earlier} earlier stages", "dim"))
    for stage in stages[-MOST_STAGES:-1]:
        table.add_row(Text(f"{stage.ended - stage.began:.1f} s", "dim"), Text(plain(stage.name, 100)))
    if stages:
        table.add_row(Text(f"{max(0.0, now - stages[-1].began):.0f} s", "cyan"), Text(stage_text(state), "bold"))
    return table


def _steps(steps: list[dict[str, Any]]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("step", "verdict", "speedup", "size", "drop"):
        table.add_column(header, justify="left" if header in ("step", "verdict") else "right")
    for step in steps[-MOST_STEPS:]:
        table.add_row(*_step_cells(step))
    return table


def _step_cells(step: dict[str, Any]) -> Iterator[Text]:
    verdict = plain(str(step.get("verdict", "kept")), 40)
    yield Text(plain(str(step.get("step", "")), 60))
    yield Text(verdict.replace("_", " "), _STYLE.get(verdict, ""))
    measured = step.get("measured")
    forms: dict[str, Callable[[Any], str]] = {
        "speedup": ratio_text,
        "size_bytes": size_text,
        "quality_drop": drop_text,
    }
    for name, form in forms.items():
        value = measured.get(name) if isinstance(measured, dict) else None
        yield Text(form(value) if isinstance(value, (int, float)) else "")
