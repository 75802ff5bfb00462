"""Whatever a model, a log or a data set calls something, no form of a report takes it for more than text."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from clean_answers import HOSTILE, assert_clean_markdown, with_texts
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, RenderableType

from omgoptim.cli.progress import live_view
from omgoptim.render import markdown, runs, terminal
from omgoptim.render.markdown import cell, code, code_cell, safe
from omgoptim.render.shared import badge_svg, card_markdown, shared_markdown
from omgoptim.reports import EfficiencyReport, LiveRun, RunState, StageTime
from omgoptim.text import clean

REPORTS = Path(__file__).parent / "reports"
BENIGN = "name"
AS_GITHUB = re.compile(
    r"(?<!\w)@\w|\w://|\bwww\.|mailto:|#\d|\bGH-\d|\$|:[a-z0-9_+-]+:|&#|\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7,40}\b"
)
"""Texts that GitHub renders as a mention, a link, a reference, mathematics or an emoji."""

hostile_names = pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))


def named(report: EfficiencyReport, name: str) -> EfficiencyReport:
    return EfficiencyReport.model_validate(with_texts(report.model_dump(mode="json"), name))


def parse(text: str) -> list[Token]:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def marks(text: str) -> list[str]:
    """Return the markdown elements in a text other than text and code spans, in order."""
    plain = {"text", "text_special", "code_inline", "softbreak"}
    found = []
    for token in parse(text):
        inner = [child.type + child.content for child in token.children or [] if child.type not in plain]
        raw = token.content if token.type == "html_block" else ""
        found += [f"{token.type} {token.tag} {raw}", *inner]
    return found


def shown(text: str) -> str:
    """The text that a reader sees."""
    tokens = [child for token in parse(text) for child in token.children or [token]]
    return "".join(token.content for token in tokens if not token.type.startswith("html"))


def outside_of_code(text: str) -> str:
    return " ".join(child.content for token in parse(text) for child in token.children or [] if child.type == "text")


@pytest.fixture
def every_kind(explained: EfficiencyReport, pruned: EfficiencyReport, distilled: EfficiencyReport) -> EfficiencyReport:
    """A report with every section."""
    parts = {name: getattr(pruned, name) for name in ("rounds", "training", "sensitivity", "skipped")}
    return explained.model_copy(update=parts | {"control": distilled.control, "layers": distilled.layers})


FORMS = {
    "brief": lambda report: markdown.report_markdown(report, "brief", Path("/run")),
    "full": lambda report: markdown.report_markdown(report, "full", Path("/run")),
    "shared": shared_markdown,
    "card": lambda report: card_markdown(report).partition("\n---\n")[2],
    "side by side": lambda report: runs.runs_markdown([run_of(report), run_of(report)]),
}

PLAIN_MARKS: dict[str, list[str]] = {}
"""The marks of each form where nothing is called anything special."""


@hostile_names
@pytest.mark.parametrize("form", FORMS)
def test_markdown_has_the_same_marks_whatever_things_are_called(
    form: str, hostile: str, every_kind: EfficiencyReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markdown, "MAX_BRIEF", 40_000)  # a text that is cut has not every mark
    text = FORMS[form](named(every_kind, hostile[:60]))
    if form not in PLAIN_MARKS:
        PLAIN_MARKS[form] = marks(FORMS[form](named(every_kind, BENIGN)))
    assert marks(text) == PLAIN_MARKS[form]
    assert_clean_markdown(text) if form in ("brief", "full") else None
    assert not AS_GITHUB.search(outside_of_code(text).replace("omgoptim", ""))


@hostile_names
def test_a_name_is_shown_as_it_is_character_by_character(hostile: str) -> None:
    for written in (safe(hostile), f"- {safe(hostile)}", f"> {code(hostile)}"):
        assert re.sub(r"\s+", " ", shown(written)).strip() == clean(hostile, 200).replace("`", "'")
    row = f"| {cell(hostile)} | {code_cell(hostile)} |"
    assert marks(f"| a | b |\n| --- | --- |\n{row}") == marks(f"| a | b |\n| --- | --- |\n| {BENIGN} | `{BENIGN}` |")


@hostile_names
def test_two_lines_of_names_make_no_table_heading_or_list(hostile: str) -> None:
    assert marks(f"{safe(hostile[:60])}\n{safe(hostile[-60:])}") == marks(f"{BENIGN}\n{BENIGN}")


@hostile_names
def test_the_head_of_a_card_is_yaml_with_the_names_as_texts(hostile: str, quantized: EfficiencyReport) -> None:
    report = named(quantized, hostile)
    metric, data = clean(hostile, 80), clean(hostile, 200)
    head = yaml.safe_load(card_markdown(report, base_model="org/model").split("\n---\n")[0])
    assert list(head) == ["license", "base_model", "tags", "model-index"]
    assert head["license"] is None
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert set(result) == {"task", "dataset", "metrics"}
    assert result["metrics"][0]["name"] == metric
    assert result["dataset"]["name"].startswith(data[:20].replace("/", "")[:1])


@hostile_names
def test_the_badge_holds_no_name(hostile: str, every_kind: EfficiencyReport) -> None:
    drawn = badge_svg(named(every_kind, hostile))
    assert drawn == badge_svg(named(every_kind, BENIGN))
    assert {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawn).iter()} == {
        *("svg", "title", "clipPath", "rect", "g", "text"),
    }


@hostile_names
def test_a_terminal_gets_text_and_colours_and_a_recording_of_it_is_a_picture(
    hostile: str, every_kind: EfficiencyReport
) -> None:
    report = named(every_kind, hostile)
    state = run_of(report).state.model_copy(update={"stage": hostile, "model": hostile})
    live = LiveRun(
        state=state,
        stages=[StageTime(name=hostile, seconds=1.0)] * 20,
        candidates=report.candidates,
        steps=report.steps,
    )
    views: list[RenderableType] = [
        terminal.report_view(report, full=True, folder=Path("/run")),
        terminal.section_view(runs.runs_section([run_of(report), runs.Run(state, None)])),
        terminal.state_view(state),
        live_view(live),
    ]
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor", record=True)
    for view in views:
        console.print(view, crop=False)
    assert isinstance(console.file, io.StringIO)
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", uncoloured)
    drawn = ElementTree.fromstring(console.export_svg())
    assert {element.tag.rpartition("}")[2] for element in drawn.iter()} == {
        *("svg", "style", "defs", "clipPath", "rect", "text", "g", "circle"),
    }


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))


@hostile_names
def test_the_page_of_several_runs_has_the_same_tags_whatever_things_are_called(
    hostile: str, every_kind: EfficiencyReport
) -> None:
    pages = [runs.runs_html([run_of(named(every_kind, name))] * 2) for name in (hostile, BENIGN)]
    assert Tags(pages[0]).found == Tags(pages[1]).found


def run_of(report: EfficiencyReport) -> runs.Run:
    record = {"run_id": report.run_id, "verb": report.verb, "status": "done", "started": "t", "updated": "t"}
    return runs.Run(RunState.model_validate(record | {"folder": "/p"}), report)
