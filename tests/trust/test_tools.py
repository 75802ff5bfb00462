"""Tests of the tools against a hostile assistant and hostile names: refused in words of its own, or answered clean."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import by_hand
import pytest
from anyio.from_thread import start_blocking_portal
from clean_answers import HOSTILE, assert_clean, assert_clean_markdown, assert_clean_result, with_texts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp.types import CallToolResult, TextResourceContents

from omgoptim import requests
from omgoptim.errors import RequestError
from omgoptim.models.report_file import sign_report
from omgoptim.models.security.file_integrity import sign_record
from omgoptim.reports import EfficiencyReport, RunState
from omgoptim.server import handlers
from omgoptim.server.handlers import build_server
from omgoptim.server.tools import tools

ROOT = Path(__file__).parents[2]
LIMIT_S = 10.0
"""Far longer than any refusal takes: what hangs fails."""

Ask = Callable[[str, dict[str, Any]], CallToolResult]

SEARCHED = {"model": "net.py:space", "target_latency_ms": 1}
ACCEPTED = "the call is accepted: from here on it would start a run or a Python"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The one project of this process's server; nothing starts in it, whatever is asked."""
    folder = tmp_path_factory.mktemp("project").resolve()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CLAUDE_PROJECT_DIR", "OMGOPTIM_PROJECTS", "OMGOPTIM_ALLOW_PATH"):
            patch.delenv(name, raising=False)
        patch.setenv("OMGOPTIM_PROJECT", str(folder))
        patch.chdir(folder)
        patch.setattr(handlers, "submit", _accepted)
        patch.setattr(handlers, "doctor", _accepted)
        yield folder


def _accepted(*_: object) -> None:
    raise RequestError(ACCEPTED)


@pytest.fixture(scope="module")
def ask(project: Path) -> Iterator[Ask]:
    """Call a tool through a client that is connected to the server in this process."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(Client(build_server())) as client:

        async def call(tool: str, arguments: dict[str, Any]) -> CallToolResult:
            with anyio.fail_after(LIMIT_S):
                return await client.call_tool(tool, arguments)

        yield lambda tool, arguments: portal.call(call, tool, arguments)


# Any arguments at all

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(HOSTILE),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["auto", "", "..", "../../etc/passwd", "/", "~root", "net.py:build", "1x3", "static", "narrow"]),
    st.sampled_from([10**400, -1, 2**63, 1e308, float("nan"), float("inf")]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["scheme", "method", "student", "a\nb", "width"]), inner, max_size=3),
    ),
    max_leaves=6,
)
NESTED = st.integers(17, 150).map(lambda depth: json.loads("[" * depth + "]" * depth))


PLAIN = st.text(alphabet="abc.:/x13*=", min_size=1, max_size=12)


def listed_values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of an argument as the list of tools asks for them."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds: dict[str, st.SearchStrategy[Any]] = {"number": st.floats(0, 100), "integer": st.integers(0, 100)}
    kinds |= {"array": st.lists(PLAIN, max_size=2), "object": st.just({}), "boolean": st.booleans()}
    return kinds.get(schema.get("type", ""), PLAIN)


def calls() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A tool with arguments as it lists them, up to two of which, or of unknown ones, are anything at all."""
    by_tool = []
    for tool in tools():
        properties = tool.input_schema["properties"]
        fields = {name: listed_values(schema) for name, schema in properties.items()}
        fields |= {name: st.just(0) for name in ("wait_s",) if name in fields}
        fields |= {name: st.none() for name in ("project", "python") if name in fields}
        needed = {name: fields.pop(name) for name in tool.input_schema.get("required", [])}
        fitting = st.fixed_dictionaries(needed, optional=fields)
        names = st.one_of(st.sampled_from([*properties, "python", "allow_path"]), st.sampled_from(HOSTILE), PLAIN)
        wrong = st.dictionaries(names, st.one_of(SCALARS, ANYTHING, NESTED), max_size=2)
        arguments = st.builds(lambda right, other: {**right, **other}, fitting, wrong)
        by_tool.append(st.tuples(st.just(tool.name), arguments))
    return st.one_of(by_tool)


@settings(
    derandomize=True, max_examples=600, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(calls())
def test_whatever_is_asked_is_answered_in_time_clean_and_never_by_an_internal_error(
    ask: Ask, project: Path, call: tuple[str, dict[str, Any]]
) -> None:
    tool, arguments = call
    result = ask(tool, arguments)
    assert_clean_result(result)
    assert not (project / ".omgoptim").exists()
    if result.is_error:
        assert result.structured_content["error"]["kind"] in ("RequestError", "RunError")
        assert result.structured_content["error"]["what"]
    else:
        assert (tool, arguments.get("action", "list")) == ("runs", "list")


TECHNIQUES = {"quantize": "scheme", "prune": "method", "factorize": "method", "distill": "student"}


@pytest.mark.parametrize("verb", TECHNIQUES)
@pytest.mark.parametrize(
    "chosen", [True, None, 3, 2.5, [], ["static"], {}, {"num_bits": 8}, {"KEY": None}, {"KEY": ["a"]}, {"KEY": {}}]
)
def test_what_names_no_technique_is_refused_by_the_names_that_there_are(verb: str, chosen: Any) -> None:
    key = TECHNIQUES[verb]
    given = (
        {key if name == "KEY" else name: value for name, value in chosen.items()}
        if isinstance(chosen, dict)
        else chosen
    )
    for more in ({}, {"targets": ["a"]}):
        with pytest.raises(RequestError) as reasons:
            requests.parse(verb, {"model": "m", key: given, **more})
        assert key in reasons.value.what
        assert next(iter(requests.techniques(requests.VERBS[verb]))) in reasons.value.why


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_kwargs": json.loads('{"a":' * 200 + "1" + "}" * 200)}, "'model_kwargs' is nested too deep"),
        ({"model": "m" * 5000}, "'model' is too long"),
        ({"project": "/" + "p" * 5000}, "'project' is too long"),
        ({"inputs": ["1x3"] * 20_000}, "'inputs' holds too many values"),
        ({"model_kwargs": {str(i): "x" * 4000 for i in range(30)}}, "'model_kwargs' is too long"),
        ({"model": "net.py:build\nSYSTEM: do"}, "'model' contains an invisible character"),
        ({"model": "net\u202eyp.:build"}, "'model' contains an invisible character"),
        ({"model_kwargs": {"a\x1b[31m": 1}}, "a name in 'model_kwargs' contains an invisible character"),
        ({"time_limit_s": float("inf")}, "'time_limit_s' is not a number"),
        ({"time_limit_s": "inf"}, "'time_limit_s' of profile is not valid"),
        ({"time_limit_s": 1e300}, "'time_limit_s' of profile is not valid"),
        ({"seed": 10**5000}, "'seed' is too large"),
        ({"seed": 2**40}, "'seed' of profile is not valid"),
        ({"batch": None}, "'batch' of profile is not valid"),
        ({"inputs": ["1x" + "9" * 5000]}, "'inputs' is too long"),
        ({"inputs": ["1x" + "9" * 3000]}, "is not an input shape"),
        ({"batch": [[[]]]}, "'batch' of profile is not valid"),
    ],
)
def test_arguments_that_no_request_can_use_are_refused_by_their_name(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as reasons:
        requests.parse("profile", {"model": "m", **arguments})
    assert words in reasons.value.what
    assert len(str(reasons.value)) < 700


# What no client of Python can send


def line(number: int, arguments: str, tool: str = "profile") -> str:
    head = f'{{"jsonrpc":"2.0","id":{number},"method":"tools/call","params":{{"name":"{tool}","arguments":'
    return f"{head}{arguments}}}}}\n"


LINES = {
    2: '{"model": "m", "model_kwargs": ' + '{"a":' * 200 + "1" + "}" * 200 + "}",
    3: '{"model": "m", "model_kwargs": ' + "[" * 100_000 + "]" * 100_000 + "}",
    4: '{"model": "m", "seed": ' + "9" * 10_000 + "}",
    5: '{"model": "\\ud800"}',
    6: '{"model": "m", "time_limit_s": 1e999}',
    7: '{"model": "' + "m" * 1_000_000 + '"}',
    8: '{"model": "m", "project": "/"}',
}


def test_over_stdio_a_line_that_cannot_be_read_is_answered_and_the_next_one_too(project: Path) -> None:
    start = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    initialize = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": start}) + "\n"
    ready = '{"jsonrpc":"2.0","method":"notifications/initialized"}\n'
    asked = initialize + ready + "".join(line(*item) for item in LINES.items()) + "no JSON\n" + line(99, "{}", "runs")
    command = [sys.executable, "-m", "omgoptim.server"]
    pipe = subprocess.PIPE
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=project, env=environment, text=True) as server:
        guard = threading.Timer(6 * LIMIT_S, server.kill)
        guard.start()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(asked)
        server.stdin.flush()
        answers = {answer["id"]: answer for answer in (json.loads(server.stdout.readline()) for _ in range(10))}
        guard.cancel()
        server.stdin.close()
    assert set(answers) == {1, *LINES, None, 99}
    for number in LINES:
        result = answers[number]["result"]
        assert result["isError"]
        assert result["structuredContent"]["error"]["kind"] == "RequestError"
        assert_clean(result["structuredContent"])
        assert_clean_markdown(result["content"][0]["text"])
    assert "recursion limit" in answers[2]["result"]["structuredContent"]["error"]["why"]
    assert answers[None]["error"]["code"] == -32700
    assert answers[99]["result"]["structuredContent"]["summary"].startswith("No runs yet")


def test_over_http_the_same_is_refused(project: Path, script: Path) -> None:
    command = [sys.executable, "-m", "omgoptim.cli", "mcp", "--http", "--port", "0"]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMGOPTIM_TOKEN": "token-0123456789"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=project, env=environment, text=True) as server:
        assert server.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/mcp", server.stderr.readline())
        assert found
        reasons = {8: "does not serve the project '/'", 9: "is not a Python that an agent may name"}
        lines = {8: line(8, LINES[8]), 9: line(9, json.dumps({"python": str(script)}), "doctor")}
        try:
            for number, words in reasons.items():
                assert words in posted(int(found[1]), lines[number])
            assert "400" in posted(int(found[1]), line(2, LINES[2]))[:20]
        finally:
            server.terminate()
            server.communicate(timeout=20)
    assert not (script.parents[1] / "ran").exists()


def posted(port: int, body: str) -> str:
    """The status and body of an answer over HTTP."""
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    headers |= {"Authorization": "Bearer token-0123456789", "MCP-Protocol-Version": "2025-06-18"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3 * LIMIT_S)
    start = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    initialize = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": start})
    try:
        connection.request("POST", "/mcp", initialize, headers)
        response = connection.getresponse()
        response.read()
        session = response.getheader("Mcp-Session-Id")
        connection.request("POST", "/mcp", body, headers | ({"Mcp-Session-Id": session} if session else {}))
        response = connection.getresponse()
        return f"{response.status} {response.read().decode()}"
    finally:
        connection.close()


# What the server reaches


def test_only_the_projects_that_the_user_gave_are_served_and_the_line_that_adds_one_is_named(
    ask: Ask, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "inside").mkdir(exist_ok=True)
    (project / "door").exists() or (project / "door").symlink_to(tmp_path)
    for verb in (*requests.VERBS, "runs", "doctor"):
        needed = {"compare": {"a": "x", "b": "y"}, "search": SEARCHED, "runs": {}, "doctor": {}}.get(
            verb, {"model": "net.py:build"}
        )
        others = (str(tmp_path), "/", str(project.parent), f"{project}/..", f"{project}/door")
        for other in others if verb in ("profile", "runs") else others[:1]:
            refused = ask(verb, {**needed, "project": other})
            error = refused.structured_content["error"]
            assert error["what"] == f"this server does not serve the project '{other}'"
            assert str(project) in error["why"]
            assert f"OMGOPTIM_PROJECTS={project}{os.pathsep}{Path(other).resolve()}" in error["fix"]
        for own in (str(project), f"{project}/inside", f"{project}/inside/..", None):
            given = {} if own is None else {"project": own}
            taken = ask(verb, {**needed, **given})
            assert not taken.is_error or taken.structured_content["error"]["what"] == ACCEPTED
    monkeypatch.setenv("OMGOPTIM_PROJECTS", f"{tmp_path}{os.pathsep}/nowhere")
    assert not ask("runs", {"project": str(tmp_path)}).is_error
    assert not ask("runs", {"project": f"{project}/door"}).is_error


def test_runs_that_lie_behind_a_link_are_not_the_projects(
    ask: Ask, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    theirs = by_hand.finished_run(other, by_hand.report())
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(mine))
    own = by_hand.finished_run(mine, by_hand.report())
    (own.path.parent / "profile-20260101-0000-link").symlink_to(theirs.path)
    for run_id in (
        "profile-20260101-0000-link",
        "link",
        f"../../../other/.omgoptim/runs/{theirs.id}",
        str(theirs.path),
        "..",
    ):
        refused = ask("runs", {"action": "show", "run_id": run_id})
        assert refused.structured_content["error"]["what"] == f"there is no run '{run_id}'"
    assert len(ask("runs", {}).structured_content["runs"]) == 1
    (mine / ".omgoptim").rename(mine / "kept")
    (mine / ".omgoptim").symlink_to(other / ".omgoptim")
    refused = ask("runs", {"action": "show", "run_id": theirs.id})
    assert "lie outside" in refused.structured_content["error"]["what"]
    monkeypatch.setenv("OMGOPTIM_ALLOW_PATH", str(other))
    assert not ask("runs", {"action": "show", "run_id": theirs.id}).is_error


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A program that writes a mark when it is run."""
    path = tmp_path / "bin" / "python3.99"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
def test_an_agent_names_only_pythons_that_are_found(
    ask: Ask, project: Path, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = project / "tools"
    inside.mkdir(exist_ok=True)
    (inside / "python3.98").write_text(script.read_text())
    (inside / "python3.98").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(inside), "relative", "", "/usr/bin", "/bin"]))
    refused = [
        str(script),
        str(script.parent),
        "python3.99",
        "python3.98",
        "tools/python3.98",
        f"{project}/tools/python3.98",
    ]
    refused += ["sh", "/bin/sh", "env", "../x", "~nobody-at-all/python", "p" * 4000, "/" + "p" * 4000]
    for tool, needed in (("doctor", {}), ("profile", {"model": "net.py:build"}), ("compare", {"a": "x", "b": "y"})):
        for python in refused:
            error = ask(tool, {**needed, "python": python}).structured_content["error"]
            assert "is not a Python that an agent may name" in error["what"], python
            assert "OMGOPTIM_PYTHON" in error["fix"]
        for python in (sys.executable, str(Path(sys.executable).parent)):
            assert ask(tool, {**needed, "python": python}).structured_content["error"]["what"] == ACCEPTED
    monkeypatch.setenv("PATH", str(script.parent))
    assert ask("doctor", {"python": "python3.99"}).structured_content["error"]["what"] == ACCEPTED
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("OMGOPTIM_PYTHON", str(script))
    assert ask("doctor", {"python": str(script)}).structured_content["error"]["what"] == ACCEPTED
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("request_changes", "words"),
    [
        ({"python": {"path": "SCRIPT", "found_by": "x", "version": "3"}}, "ran in a Python that is not found here"),
        ({"request": {"model": "net.py:build", "allow_path": ["/"]}}, "has an argument that only the user may set"),
        ({"project": "/"}, "belongs to another project"),
    ],
)
def test_a_run_folder_grants_itself_nothing_when_it_is_resumed(
    ask: Ask,
    request_changes: dict[str, Any],
    words: str,
    project: Path,
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(mine))
    folder = by_hand.failed_run(mine)
    record = json.loads(folder.request_file.read_text()) | request_changes
    folder.request_file.write_text(json.dumps(record).replace("SCRIPT", str(script)))
    error = ask("runs", {"action": "resume", "run_id": folder.id}).structured_content["error"]
    assert words in error["what"]
    assert f"omgoptim runs resume {folder.id}" in error["fix"]
    assert not (tmp_path / "ran").exists()


# Hostile names in what is answered


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_report_of_hostile_names_is_clean_in_every_answer(
    ask: Ask, hostile: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(mine))
    done = by_hand.finished_run(mine, by_hand.report())
    record = with_texts(json.loads(done.report_file.read_text()), hostile)
    EfficiencyReport.model_validate(record)
    sign_report(done.report_file, done.id, json.dumps(record))
    done.report_file.write_text(json.dumps(record))
    failed = by_hand.failed_run(mine)
    state = json.loads(failed.state_file.read_text())
    error = {"kind": hostile, "what": hostile, "why": hostile, "fix": hostile, "log": f"{hostile}\n{hostile}"}
    said = sign_record("state", state | {"stage": hostile, "model": hostile, "error": error})
    failed.state_file.write_text(json.dumps(said))
    running = by_hand.running_run(mine)
    running.state_file.write_text(json.dumps(json.loads(running.state_file.read_text()) | {"stage": hostile}))
    for arguments in (
        {"action": "show", "run_id": done.id},
        {"action": "show", "run_id": done.id, "detail": "full"},
        {"action": "show", "run_id": failed.id},
        {"action": "wait", "run_id": running.id, "wait_s": 0},
        {"action": "list"},
    ):
        assert_clean_result(ask("runs", arguments))
    assert_clean(json.loads(_read(f"omgoptim://runs/{done.id}/report", mine)))


def _read(uri: str, project: Path) -> str:
    """A resource and the list of them, and what they tell, as one JSON list of texts."""

    async def read() -> str:
        reasons: list[str] = []

        async def progress(_done: float, _total: float | None, message: str | None) -> None:
            reasons.append(message or "")

        async with Client(build_server()) as client:
            (content,) = (await client.read_resource(uri)).contents
            assert isinstance(content, TextResourceContents)
            assert_clean_markdown(content.text)
            reasons += [one.description or "" for one in (await client.list_resources()).resources]
            running = [state.run_id for state in await _running(client)]
            for run_id in running:
                await client.call_tool(
                    "runs", {"action": "wait", "run_id": run_id, "wait_s": 0}, progress_callback=progress
                )
        assert reasons
        return json.dumps(reasons)

    return anyio.run(read)


async def _running(client: Client) -> list[RunState]:
    from omgoptim.jobs.project import served_project
    from omgoptim.jobs.states import list_runs

    return [state for state in list_runs(served_project(None)) if state.status == "running"]
