"""Tests of what the Python face shows while a run goes on, and of how it names arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import by_hand
import pytest

from omgoptim import api
from omgoptim.cli.progress import watching


def test_a_run_shows_where_it_stands_on_standard_error_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.finished_run(tmp_path, by_hand.report("profiled"))
    running = by_hand.running_run(tmp_path)
    told = ""
    with watching(running, lines=True):
        while "measuring" not in told:  # a test that hangs fails
            told += capsys.readouterr().err
    with watching(folder):
        pass  # a run that has ended shows nothing, and its watcher ends
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("asked", "terminal", "notebook", "shown"),
    [
        (None, False, False, False),
        (None, True, False, True),
        (None, False, True, True),
        (True, False, False, True),
        (False, True, True, False),
    ],
)
def test_progress_is_shown_where_a_person_looks_or_where_it_is_asked_for(
    asked: bool | None, terminal: bool, notebook: bool, shown: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    watched = api._shown(by_hand.running_run(tmp_path), asked)
    assert (type(watched).__name__ != "nullcontext") is shown
