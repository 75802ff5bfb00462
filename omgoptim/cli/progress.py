"""Where a run stands, on standard error: a live bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from typing_extensions import Self

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.follow import follow
from omgoptim.render import numbers
from omgoptim.reports import RunState


class Display(Protocol):
    """Something that shows the states of a run as they come."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, state: RunState) -> None:
        """Show a new state of the run."""
        ...


def display(console: Console) -> Display:
    """The display that fits where standard error goes."""
    return LiveBar(console) if console.is_terminal else StageLines(console)


@contextmanager
def watching(folder: RunFolder, *, lines: bool = False) -> Iterator[None]:
    """Show on standard error where a run of this process stands, from a thread of its own.

    Args:
        folder: of the run.
        lines: one line a stage even on a terminal, as a notebook shows best.
    """
    console = Console(file=sys.stderr, highlight=False, force_jupyter=False)
    ended = threading.Event()

    def show() -> None:
        with suppress(OmgoptimError):  # a folder that is taken away meanwhile has no state to show
            for state in follow(folder):
                if ended.is_set():
                    return
                shown.show(state)

    with StageLines(console) if lines else display(console) as shown:
        watcher = threading.Thread(target=show, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(timeout=2)


class LiveBar:
    """Stage, bar, percent and remaining time on one line that goes away when the run ends."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID = self._progress.add_task("starting", total=None, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, state: RunState) -> None:
        """Show a new state of the run."""
        total, done = (None, None) if state.progress is None else (1.0, state.progress)
        shown = ", ".join(numbers.progress_numbers(state))
        stage = numbers.stage_text(state)
        self._progress.update(self._task, description=stage, total=total, completed=done, numbers=shown)


class StageLines:
    """One line whenever the stage changes. What follows a colon in a stage is a detail that may change often."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, state: RunState) -> None:
        """Show a new state of the run."""
        stage = state.stage.partition(": ")[0]
        if stage != self._stage and state.status in ("starting", "queued", "running"):
            self._stage = stage
            self._console.print(numbers.progress_text(state), markup=False, highlight=False, soft_wrap=True)
