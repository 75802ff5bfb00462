"""However a run ended or stands, each form of its answer alone has verdict, interval, warnings and what is next."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import by_hand
import pytest
from mcp.types import CallToolResult, TextContent
from rich.console import Console

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import as_cancelled, load_report, read_state
from omgoptim.render import terminal
from omgoptim.render.shared import error_to_share, shared_markdown
from omgoptim.reports import EfficiencyReport, RunState
from omgoptim.server import answers

OVERLOADED = "other processes used 92% of the CPU: no ratio of times is given"
REPORTS: dict[str, Callable[[], EfficiencyReport]] = {
    "OK": by_hand.report,
    "NO GAIN": lambda: by_hand.report(outcome="no_gain"),
    "GUARD FAILED": lambda: by_hand.report(outcome="guard_failed"),
    "MEASURED": lambda: by_hand.report("profiled"),
    "PLAN": lambda: by_hand.report("planned"),
}


def undecided() -> EfficiencyReport:
    """A report of a machine that was too busy for any ratio of times."""
    answer = by_hand.report(warnings=[OVERLOADED])
    assert answer.gains is not None
    nothing = dict.fromkeys(("speedup", "speedup_low", "speedup_high", "throughput_ratio"))
    return answer.model_copy(update={"gains": answer.gains.model_copy(update=nothing)})


def text_of(result: CallToolResult) -> str:
    (block,) = result.content
    assert isinstance(block, TextContent)
    return block.text


def printed(report: EfficiencyReport, folder: RunFolder) -> str:
    console = Console(file=io.StringIO(), width=4000)
    console.print(terminal.report_view(report, folder=folder.path), crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FORMS: dict[str, Callable[[EfficiencyReport, RunFolder], str]] = {
    "text": lambda report, folder: text_of(answers.report_answer(report, folder, "brief")),
    "whole text": lambda report, folder: text_of(answers.report_answer(report, folder, "full")),
    "terminal": printed,
    "markdown to share": lambda report, _: shared_markdown(report),
}
STRUCTURES = ("brief", "full")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verdict", [*REPORTS, "undecided"])
def test_a_text_alone_has_the_verdict_the_interval_the_warnings_and_the_next_step(
    verdict: str, form: str, tmp_path: Path
) -> None:
    report = undecided() if verdict == "undecided" else REPORTS[verdict]()
    folder = by_hand.finished_run(tmp_path, report)
    text = FORMS[form](load_report(folder), folder)
    assert ("OK" if verdict == "undecided" else verdict) in text
    assert all(warning in text for warning in report.warnings)
    assert report.next_steps[0].command in text
    if verdict == "undecided":
        assert "the machine was overloaded" in text
        assert "x faster (" not in text.replace(report.summary, "")
    elif report.gains is not None:
        assert "5.79x faster (5.41 to 6.18)" in text
        assert "drop 0.0028 (-0.0041 to 0.0083)" in text


@pytest.mark.parametrize("detail", STRUCTURES)
@pytest.mark.parametrize("verdict", [*REPORTS, "undecided"])
def test_a_structure_alone_has_the_verdict_the_interval_the_warnings_and_the_next_step(
    verdict: str, detail: answers.Detail, tmp_path: Path
) -> None:
    report = undecided() if verdict == "undecided" else REPORTS[verdict]()
    folder = by_hand.finished_run(tmp_path, report)
    structure = answers.report_answer(load_report(folder), folder, detail).structured_content
    assert structure is not None
    if detail == "brief":
        assert structure["verdict"] == ("OK" if verdict == "undecided" else verdict)
    else:
        assert bool(structure["request"].get("plan")) == (verdict == "PLAN")
    assert structure["outcome"] == report.outcome
    assert structure["warnings"] == report.warnings
    assert structure["next_steps"][0]["command"] == report.next_steps[0].command
    gains = structure.get("gains") or {}
    if report.gains is not None:
        speed = (gains.get("speedup"), gains.get("speedup_low"), gains.get("speedup_high"))
        assert speed == ((None, None, None) if verdict == "undecided" else (5.79, 5.41, 6.18))
        assert (gains["quality_drop_low"], gains["quality_drop_high"]) == (-0.0041, 0.0083)


@pytest.mark.parametrize("status", ["starting", "queued", "running"])
def test_a_run_that_goes_on_says_where_it_stands_and_how_to_wait(status: str, tmp_path: Path) -> None:
    state = read_state(by_hand.running_run(tmp_path)).model_copy(update={"status": status})
    answer = answers.unfinished_answer(state, tmp_path, 45.0)
    structure = answer.structured_content
    assert structure is not None
    assert structure["status"] == status
    assert "12 s left" in structure["summary"]
    assert structure["next_steps"][0]["arguments"]["action"] == "wait"
    assert status.upper() in text_of(answer)
    assert "measuring, 40%, 12 s left" in text_of(answer)
    assert f"run_id='{state.run_id}'" in text_of(answer)
    assert status in shown_state(state)
    assert "measuring, 40%, 12 s left" in shown_state(state)


def cancelled_run(project: Path) -> RunFolder:
    folder = by_hand.running_run(project)
    folder.write_state(as_cancelled(read_state(folder)))
    return folder


@pytest.mark.parametrize(("end", "what", "then"), [
    (by_hand.failed_run, "the model broke", "a way out"),
    (cancelled_run, "was cancelled", "run again: omgoptim profile"),
])  # fmt: skip
def test_a_run_without_a_report_says_what_happened_and_what_to_do(
    end: Callable[[Path], RunFolder], what: str, then: str, tmp_path: Path
) -> None:
    folder = end(tmp_path)
    with pytest.raises(OmgoptimError) as caught:
        load_report(folder)
    answer = answers.error_answer(caught.value, folder.id)
    console = Console(file=io.StringIO(), width=4000)
    console.print(terminal.error_view(caught.value))
    assert isinstance(console.file, io.StringIO)
    forms = [
        json.dumps(answer.structured_content),
        text_of(answer),
        console.file.getvalue(),
        error_to_share(caught.value),
    ]
    for form in forms:
        assert what in form
        assert then in form
    assert answer.is_error


def shown_state(state: RunState) -> str:
    console = Console(file=io.StringIO(), width=400)
    console.print(terminal.state_view(state))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
