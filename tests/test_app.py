"""Tests of the page in a chat (MCP Apps): what clients with and without it get, in both protocol eras."""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import by_hand
import pytest
from mcp import Client
from mcp.client import advertise
from mcp.types import CallToolResult, TextResourceContents

from omgoptim.jobs.folder import RunFolder, Submission, new_run
from omgoptim.jobs.follow import read_live
from omgoptim.jobs.processes import this_process
from omgoptim.jobs.progress import Progress
from omgoptim.render.brief import brief_report
from omgoptim.render.claims import speed_claim, verdict
from omgoptim.render.document import document_json, report_document
from omgoptim.render.markdown import report_markdown
from omgoptim.render.runs import live_document
from omgoptim.reports import Candidate, Epoch, Step
from omgoptim.server import app
from omgoptim.server.handlers import build_server
from omgoptim.server.tools import tools

ERAS = ("legacy", "auto")
REPORTS = sorted(file.stem for file in by_hand.REPORTS.glob("*.json"))
APPS = advertise(app.EXTENSION, {"mimeTypes": [app.MIME_TYPE]})
OTHER_KIND = advertise(app.EXTENSION, {"mimeTypes": ["text/html"]})

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(tmp_path))
    return tmp_path


@asynccontextmanager
async def connected(era: str, *extensions: Any) -> AsyncIterator[Client]:
    async with Client(build_server(), mode=era, extensions=extensions) as client:
        yield client


def opened(project: Path, verb: str, request: dict[str, Any]) -> RunFolder:
    """A run that this very process does."""
    folder = new_run(project, verb)
    folder.write_request(Submission(verb, request, project, "python", "a test", "3"))
    folder.write_worker(this_process())
    return folder


def page_of(result: CallToolResult) -> dict[str, Any]:
    assert result.meta is not None
    page = result.meta[app.META]
    assert isinstance(page, dict)
    return page


@pytest.mark.parametrize("era", ERAS)
async def test_only_a_client_that_shows_pages_is_given_them(era: str, project: Path) -> None:
    folder = by_hand.finished_run(project, by_hand.report("quantized"))
    asked = {"action": "show", "run_id": folder.id, "project": str(project)}
    for extensions, shows in (((), False), ((OTHER_KIND,), False), ((APPS,), True)):
        async with connected(era, *extensions) as client:
            advertised = client.server_capabilities.extensions
            assert advertised == ({app.EXTENSION: {}} if era == "auto" else None)  # the SDK's older form has no place
            listed = {tool.name: tool.meta for tool in (await client.list_tools()).tools}
            answer = await client.call_tool("runs", asked)
        assert list(listed) == [tool.name for tool in tools()]
        bound = {"ui": {"resourceUri": app.URI}, "ui/resourceUri": app.URI}
        assert all(meta == (bound if shows and name != "doctor" else None) for name, meta in listed.items())
        assert (app.META in (answer.meta or {})) is shows
        assert answer.structured_content is not None
        assert answer.structured_content["outcome"] == "ok"


@pytest.mark.parametrize("era", ERAS)
async def test_the_page_is_read_but_not_listed_and_loads_nothing(era: str, project: Path) -> None:
    async with connected(era, APPS) as client:
        listed = await client.list_resources()
        (page,) = (await client.read_resource(app.URI)).contents
    assert all(str(one.uri) != app.URI for one in listed.resources)
    assert isinstance(page, TextResourceContents)
    assert page.mime_type == app.MIME_TYPE
    assert len(page.text.encode()) <= 60_000
    assert "default-src 'none'" in page.text
    assert re.findall(r"\b(?:src|href)=|url\(|@import|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", page.text) == []
    assert set(re.findall(r"https?://[^\s\"']+", page.text)) == {"http://www.w3.org/2000/svg"}


async def test_the_buttons_of_a_finished_run_say_the_exact_call(project: Path) -> None:
    report = by_hand.report("quantized")
    long = report.next_steps[0].model_copy(update={"arguments": {"a": "x" * 3000, "b": "y"}})
    folder = by_hand.finished_run(project, report.model_copy(update={"next_steps": [long, report.next_steps[1]]}))
    async with connected("auto", APPS) as client:
        page = page_of(await client.call_tool("runs", {"action": "show", "run_id": folder.id}))
    (longer,) = [action for action in page["actions"] if action["label"] == "Repeat with effort best"]
    call, _, arguments = longer["message"].partition(" with ")
    assert call == "Call the tool quantize of omgoptim"
    given = json.loads(arguments)
    assert given["effort"] == "best"
    assert given["project"] == str(project)
    assert given["model"] == "examples/digits_cnn.py:build"
    asks = [
        block["ask"]
        for section in page["sections"]
        for block in section["blocks"]
        if block["type"] == "code" and "ask" in block
    ]
    assert [ask.split(" ")[3] for ask in asks] == [step.tool for step in report.next_steps]
    assert json.loads(asks[0].partition(" with ")[2]) == {**long.arguments, "project": str(project)}


async def test_a_run_that_goes_on_shows_its_stages_its_candidates_and_the_call_to_look_again(project: Path) -> None:
    folder = opened(project, "quantize", {"model": "m.py:build", "max_quality_drop": 0.01})
    with Progress(folder, folder.stored_state().model_copy(update={"pid": os.getpid()})) as progress:
        progress.start("getting ready")
        progress.report("screening 2 candidates", 0.4)
        progress.wait("waiting for cpu")
        progress.end_wait()
        for name, speed, drop in (("int8 <b>", None, 0.0), ("int8 <b>", 2.0, 0.0), ("bf16", 1.5, 0.02)):
            progress.publish(
                Candidate(name=name, scheme="static", runtime="onnxruntime", size_bytes=10, speedup=speed,
                          quality=0.9 - drop, quality_drop=drop, status="planned", why="")
            )  # fmt: skip
        async with connected("auto", APPS) as client:
            page = page_of(await client.call_tool("runs", {"action": "show", "run_id": folder.id}))
    assert dict(page["poll"]) == {"action": "show", "run_id": folder.id, "project": str(project)}
    assert page["title"] == "screening 2 candidates"
    candidates, stages = page["sections"]
    assert [row[0] for row in stages["blocks"][0]["rows"]] == [
        "getting ready",
        "screening 2 candidates",
        "waiting for cpu",
    ]
    scatter, table = candidates["blocks"]
    assert [point["kind"] for point in scatter["drawing"]["points"]] == ["original", "point", "outside"]
    assert scatter["drawing"]["guard"] == pytest.approx(0.89)
    assert [row[1] for row in table["rows"]] == ["int8 <b>", "bf16"]
    (cancel,) = page["actions"]
    assert cancel["confirm"]
    assert json.loads(cancel["message"].partition(" with ")[2])["action"] == "cancel"


def test_epochs_of_the_last_training_are_shown_and_what_is_no_event_is_passed_over(project: Path) -> None:
    folder = opened(project, "distill", {"model": "m"})
    epochs = [Epoch(epoch=number, loss=1 / number, learning_rate=1e-3, seconds=1) for number in (1, 2, 3, 1, 2)]
    with Progress(folder, folder.stored_state()) as progress:
        progress.start("training: epoch 1 of 3")
        for epoch in epochs:
            progress.publish(epoch)
        progress.publish(Step(name="s", verb="prune", status="kept"))
    with folder.events_file.open("ab") as file:
        file.write(b'{"kind": "epoch", "record": {"no": 1}}\n[1]\n{"kind": []}\n\xff\n{"t": "x", "stage": 1}\n{"half')
    live = read_live(folder)
    assert live.epochs == epochs[3:]
    assert [step.name for step in live.steps] == ["s"]
    assert [stage.name for stage in live.stages] == ["training"]
    titles = [section.title for section in live_document(live, str(project)).sections]
    assert titles == ["Steps so far", "Training", "Stages"]


@pytest.mark.parametrize("limit", [app.MAX_PAGE_BYTES, 8_000])
def test_a_document_keeps_to_its_limit_and_says_what_it_leaves_out(limit: int) -> None:
    report = by_hand.report("quantized")
    many = [report.candidates[0].model_copy(update={"name": f"candidate {number}"}) for number in range(3000)]
    text = document_json(report_document(report.model_copy(update={"candidates": many})), limit)
    assert len(text.encode()) <= limit
    (candidates,) = [one for one in json.loads(text)["sections"] if one["title"] == "Candidates"]
    table = candidates["blocks"][-1]
    assert table["left_out"] + len(table["rows"]) == 3000


@pytest.mark.parametrize("outcome", ["ok", "no_gain", "guard_failed"])
@pytest.mark.parametrize("name", REPORTS)
def test_text_structure_and_page_each_carry_verdict_interval_warnings_and_next_step(name: str, outcome: str) -> None:
    report = by_hand.report(name, outcome=outcome)
    text = report_markdown(report, "brief")
    structure = brief_report(report)
    page = json.loads(document_json(app.finished_document(report, "/p"), app.MAX_PAGE_BYTES))
    text = json.dumps(page, ensure_ascii=False)
    assert verdict(report) in text
    assert structure["outcome"] == outcome == page["tone"]
    assert page["verdict"] == verdict(report)
    for warning in report.warnings:
        assert warning[:30] in text  # further on it may have marks, which markdown takes out
        assert warning in structure["warnings"]
        assert warning in page["sections"][0]["blocks"][0]["items"]
    for step in report.next_steps:
        assert step.command in text
        assert step.command in [one["command"] for one in structure["next_steps"]]
        assert f"Call the tool {step.tool} of omgoptim" in text
    gains = report.gains
    if gains and gains.speedup_low and gains.speedup_high:
        claim, _ = speed_claim(gains)
        interval = claim[claim.index("(") :]
        assert interval in text
        assert interval in text
        assert (structure["gains"]["speedup_low"], structure["gains"]["speedup_high"]) == (
            gains.speedup_low,
            gains.speedup_high,
        )
