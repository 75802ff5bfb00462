"""Tests of the commands about runs: report, open, watch, and the form that fits a pull request."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import by_hand
import pytest
from rich.console import Console

from omgoptim import cli
from omgoptim.cli import output
from omgoptim.cli.progress import curve_text, live_view, watch
from omgoptim.jobs.states import as_done, read_state
from omgoptim.reports import Epoch, LiveRun, RunState, StageTime, Step

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project that is the working directory."""
    for name in ("OMGOPTIM_PROJECT", "CLAUDE_PROJECT_DIR", "OMGOPTIM_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --format markdown


def test_markdown_of_a_run_is_what_a_pull_request_shows(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    assert cli.run(["runs", "show", folder.id, "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("### omgoptim quantize `examples/digits_cnn.py:build`\n\n**OK** ")
    assert "<details>" in text
    assert str(project) not in text


def test_markdown_of_a_failure_is_on_stdout_without_paths_and_the_error_on_stderr(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_hand.failed_run(project)
    assert cli.run(["runs", "show", folder.id, "--format=markdown"]) == 3
    streams = capsys.readouterr()
    assert streams.out.startswith("**FAILED** omgoptim\n\nError: the model broke\n")
    assert streams.err.startswith("error: the model broke")


def test_a_form_is_one_of_those_there_are_and_only_one(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs", "list", "--format", "markdwn"]) == 2
    assert "Did you mean 'markdown'?" in capsys.readouterr().err
    assert cli.run(["runs", "list", "--format", "markdown", "--json"]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_a_list_and_a_run_that_goes_on_have_every_form(
    form: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_hand.running_run(project)
    for words in (["list"], ["show", folder.id]):
        assert cli.run(["runs", *words, "--format", form]) == 0
        text = capsys.readouterr().out
        assert folder.id in text
        assert "measuring" in text
        assert (form == "json") == text.startswith("{")


# report


def test_several_runs_are_a_table_and_a_file_has_the_form_of_its_ending(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [by_hand.finished_run(project, by_hand.report(name)) for name in ("quantized", "factorized")]
    ids = [folder.id for folder in folders]
    assert cli.run(["report", *ids]) == 0
    text = capsys.readouterr().out
    assert "GUARD FAILED" in " ".join(text.split())
    assert "divided by each other" in " ".join(text.split())
    beginnings = {"week.html": "<!doctype html>", "week.md": "### Runs side by side", "week.json": "{"}
    for name, beginning in beginnings.items():
        assert cli.run(["report", *ids, "--output", name]) == 0
        assert capsys.readouterr().out == f"{name}\n"
        written = (project / name).read_text()
        assert written.startswith(beginning)
        assert all(run_id in written for run_id in ids)
    assert [run["run_id"] for run in json.loads((project / "week.json").read_text())["runs"]] == ids


def test_a_file_that_is_there_is_not_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    (project / "mine.html").write_text("mine")
    assert cli.run(["report", folder.id, "--output", "mine.html"]) == 2
    assert (project / "mine.html").read_text() == "mine"
    assert cli.run(["report", folder.id, "--output", "no/such/folder.html"]) == 2
    assert "cannot write 'no/such/folder.html'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--format", "pdf"], "Known: html, json, markdown, text."),
        (["--output", "week.pdf"], "one of .html, .md, .json, .txt"),
    ],
)
def test_a_form_that_no_report_has_is_refused_with_those_there_are(
    given: list[str], says: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    assert cli.run(["report", folder.id, *given]) == 2
    assert says in capsys.readouterr().err
    assert not (project / "week.pdf").exists()


def test_an_unknown_action_is_refused_with_all_there_are(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs", "look", "--project", str(project)]) == 2
    assert "Known: cancel, list, open, pick, resume, show, wait, watch." in capsys.readouterr().err


def test_one_run_is_its_own_report_and_none_are_the_newest(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report"]) == 3
    assert "there are no runs" in capsys.readouterr().err
    folder = by_hand.finished_run(project, by_hand.report())
    assert cli.run(["report", folder.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(folder.report_file.read_text())
    assert cli.run(["report", folder.id, "--format", "html"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")
    by_hand.failed_run(project)
    assert cli.run(["report", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "| FAILED |" in text
    assert f"`{folder.id}` | OK" in text


# open


@pytest.mark.skipif(os.name != "posix", reason="the browser is a shell script")
def test_open_gives_the_page_to_the_browser_made_anew_from_the_report(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    folder.html_file.write_text("<script>of somebody else</script>")
    browser = project / "browser.sh"
    browser.write_text(f'#!/bin/sh\necho "$1" > {shlex.quote(str(project / "opened"))}\n')
    browser.chmod(0o755)
    code = f"from omgoptim import cli; raise SystemExit(cli.run(['runs', 'open', {folder.id!r}]))"
    environment = os.environ | {
        "BROWSER": str(browser),
        "PYTHONPATH": str(ROOT),
    }  # read when Python first looks for one
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder.html_file)
    assert (project / "opened").read_text().strip() == folder.html_file.as_uri()
    assert "5.79x" in folder.html_file.read_text()
    assert "of somebody else" not in folder.html_file.read_text()


def test_where_no_browser_is_found_the_path_is_printed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    assert cli.run(["runs", "open", folder.id]) == 0
    streams = capsys.readouterr()
    assert streams.out == f"{folder.html_file}\n"
    assert "no browser was found" in streams.err
    assert cli.run(["runs", "open", folder.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(folder.html_file), "opened": False}


@pytest.mark.parametrize("action", ["open", "watch"])
def test_a_run_has_to_be_named(action: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs", action]) == 2
    assert f"action '{action}' needs run_id" in capsys.readouterr().err


# watch


def shown(run: LiveRun) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(live_view(run))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_view_has_stages_with_times_what_was_measured_the_curves_and_the_time_left() -> None:
    record = {"run_id": "r", "verb": "prune", "status": "running", "started": "t", "updated": "t", "folder": "/p"}
    now = {"stage": "training: epoch 4 of 8", "progress": 0.5, "eta_s": 20.0}
    stages = [StageTime(name=f"stage {number}", seconds=1.0) for number in range(20)]
    epochs = [
        Epoch(epoch=number, loss=loss, quality=quality, learning_rate=0.1, seconds=1.0)
        for number, loss, quality in ((1, 2.0, 0.5), (2, None, None), (3, 1.0, 0.8), (4, 0.5, 0.9))
    ]
    run = LiveRun(
        state=RunState.model_validate(record | now),
        stages=[*stages, StageTime(name="training", seconds=7.0)],
        steps=[Step(name="quantize", verb="quantize", status="kept", speedup=9.36, size_bytes=238_000)],
        epochs=epochs,
    )
    text = shown(run)
    for needed in ("50%, 20 s left", "10 earlier stages", "1.0 s  stage 19", "7.0 s  training: epoch 4 of 8"):
        assert needed in text
    assert "stage 9" not in text
    waiting = run.state.model_copy(update={"stage": "stage 3: another run measures"})  # a stage that it was in before
    assert "1.0 s  stage 3: another run measures" in shown(run.model_copy(update={"state": waiting}))
    assert text.split("quantize")[1].split()[:3] == ["kept", "9.36x", "238"]
    assert "loss    █▃▁ 2 -> 0.5, 3 epochs" in text
    assert "quality ▁▆█ 0.5 -> 0.9, 3 epochs" in text


def test_a_candidate_that_is_not_judged_yet_is_shown_with_what_was_done_to_it(tmp_path: Path) -> None:
    first = by_hand.report().candidates[0]
    candidate = first.model_copy(update={"status": "planned", "why": "screened with one launch", "speedup": 5.8})
    state = read_state(by_hand.running_run(tmp_path))
    text = shown(LiveRun(state=state, candidates=[candidate]))
    assert "screened with one launch" in text
    assert "5.80x" in text


def test_a_curve_of_many_epochs_is_short_and_ends_with_the_last() -> None:
    text = curve_text([1 / epoch for epoch in range(1, 1001)])
    assert text.endswith("▁ 1 -> 0.001, 1000 epochs")
    assert len(text.partition(" ")[0]) == 40
    assert curve_text([0.5]) == "▁ 0.5 -> 0.5, 1 epoch"


def test_watching_ends_with_the_report(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.finished_run(project, by_hand.report(outcome="guard_failed"))
    assert cli.run(["runs", "watch", folder.id]) == output.GUARD_FAILED
    assert "5.79x" in capsys.readouterr().out


def test_on_a_terminal_the_view_is_live_and_goes_away(tmp_path: Path) -> None:
    folder = by_hand.running_run(tmp_path)
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    folder.write_state(as_done(read_state(folder), by_hand.report()))
    assert watch(folder, console)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?25l" in console.file.getvalue()  # the cursor is hidden while it is drawn, and comes back
    assert console.file.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in console.file.getvalue()


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_ctrl_c_ends_the_watching_and_leaves_the_run_alone(project: Path) -> None:
    folder = by_hand.running_run(project)
    command = [sys.executable, "-m", "omgoptim.cli", "runs", "watch", folder.id]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as watching:
        assert watching.stderr is not None
        assert watching.stderr.readline() == "measuring, 40%, 12 s left\n"
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=60)
    assert watching.returncode == output.INTERRUPTED
    assert out == ""
    assert f"run {folder.id} continues" in err
    assert read_state(folder).status == "running"
