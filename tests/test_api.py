"""Tests of the Python interface: what it shows while a run goes on, and a technique given by its parameters."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from types import ModuleType

import by_hand
import pytest
from torch import nn

import omgoptim
from omgoptim.api import live_call
from omgoptim.cli.progress import watching


class Listener(io.StringIO):
    """A stream that says when a word was written to it."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word, self.heard = word, threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._word in self.getvalue():
            self.heard.set()
        return written


def test_a_run_shows_where_it_stands_on_standard_error_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = by_hand.finished_run(tmp_path, by_hand.report("profiled"))
    running = by_hand.running_run(tmp_path)
    stream = Listener("measuring")
    monkeypatch.setattr(sys, "stderr", stream)
    with watching(running, lines=True):
        assert stream.heard.wait(60)
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
    watched = live_call.progress_display(by_hand.running_run(tmp_path), asked)
    assert (type(watched).__name__ != "nullcontext") is shown


def test_a_technique_is_given_by_name_or_by_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    report = omgoptim.prune(module, omgoptim.Magnitude(sparsity=0.75), inputs=["1x8"], plan=True)
    assert report.request["method"]["method"] == "magnitude"
    assert report.request["method"]["sparsity"] == 0.75
    named = omgoptim.prune(module, "magnitude", sparsity=0.75, inputs=["1x8"], plan=True)
    assert named.request["method"] == report.request["method"]
    with pytest.raises(omgoptim.OmgoptimError):
        omgoptim.quantize(module, omgoptim.Magnitude(), inputs=["1x8"], plan=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in omgoptim.__all__ if name[0].isupper()])
def test_every_public_class_is_there_and_says_what_it_is(name: str) -> None:
    assert (getattr(omgoptim, name).__doc__ or "").strip()
