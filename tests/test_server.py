"""Tests of the MCP server, over real stdio and HTTP with the SDK's own client, in both protocol eras."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, get_args

import anyio
import by_hand
import jsonschema
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp.types import CallToolResult, TextContent, TextResourceContents
from pydantic.fields import FieldInfo

from omgoptim import requests
from omgoptim.errors import RequestError
from omgoptim.jobs.actions import cancel
from omgoptim.jobs.folder import find_run
from omgoptim.jobs.states import list_runs, read_state
from omgoptim.reports import NextStep
from omgoptim.requests.base import is_rare, short_text
from omgoptim.server import tools, waiting
from omgoptim.server.documents import Command, commands

ROOT = Path(__file__).parents[1]
ERAS = ("legacy", "auto")

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project whose runs all end with the test."""
    (tmp_path / "sleeper.py").write_text(by_hand.SLEEPER)
    yield tmp_path
    for state in list_runs(tmp_path):
        if state.pid != os.getpid():  # a run written by hand says that this very process is its worker
            cancel(find_run(tmp_path, state.run_id))


def environment(project: Path, **more: str) -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT), "OMGOPTIM_PROJECT": str(project), "OMGOPTIM_PYTHON": sys.executable}
    return dict(os.environ) | ours | more


@asynccontextmanager
async def connected(project: Path, era: str = "auto", **more: str) -> AsyncIterator[Client]:
    """A client with a server process of its own."""
    how = StdioServerParameters(
        command=sys.executable, args=["-m", "omgoptim.server"], env=environment(project, **more), cwd=str(project)
    )
    async with Client(how, mode=era) as client:
        yield client


def text_of(result: CallToolResult) -> str:
    (block,) = result.content
    assert isinstance(block, TextContent)
    return block.text


def wire(value: Any) -> str:
    return json.dumps(value.model_dump(by_alias=True, exclude_none=True, mode="json"), separators=(",", ":"))


# What it offers


@pytest.mark.parametrize("era", ERAS)
async def test_the_tool_list_is_small_complete_and_in_a_fixed_order(era: str, project: Path) -> None:
    async with connected(project, era) as client:
        listed = (await client.list_tools()).tools
        assert client.instructions is not None
        assert len(client.instructions) <= 2048
    assert [tool.name for tool in listed] == [*requests.VERBS, *requests.QUERIES]
    assert sum(len(wire(tool)) + 1 for tool in listed) <= 12_000
    for tool in listed:
        assert tool.title
        assert tool.description
        assert len(tool.description) <= 1000
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint is (tool.name == "doctor")
        assert tool.annotations.open_world_hint is (tool.name in requests.VERBS)
        assert ("with the user's rights" in tool.description) == (tool.name in requests.VERBS)
        assert tool.output_schema
        assert tool.input_schema["additionalProperties"] is False
        assert '"title"' not in wire(tool).replace(f'"title":"{tool.title}"', "")
        assert "$defs" not in tool.input_schema


def test_the_schema_of_a_tool_has_every_argument_that_the_request_takes() -> None:
    for tool in tools.tools():
        request = (requests.VERBS | requests.QUERIES)[tool.name]
        known = set(request.model_fields) - set(tools.SHELL_ONLY)
        for params in requests.techniques(request).values():
            loaded = {"source"} if params.by_source else set()
            one_choice = {name for name, field in params.model_fields.items() if len(get_args(field.annotation)) == 1}
            known |= set(params.model_fields) - (one_choice - {"targets", "ignore"}) - loaded
        own = set() if tool.name == "doctor" else {"wait_s", "detail"}
        rare = set(tools.options_of(tool.name))
        assert rare <= known
        options = {"options"} if rare else set()
        assert set(tool.input_schema["properties"]) == (known - rare) | own | options
        assert tool.input_schema.get("required", []) == [
            name for name, field in request.model_fields.items() if field.is_required()
        ]


def test_the_schema_of_a_tool_is_valid_and_names_the_type_of_what_is_no_single_value() -> None:
    for tool in tools.tools():
        jsonschema.Draft202012Validator.check_schema(tool.input_schema)
        listed = tool.input_schema["properties"]
        for name in {"inputs", "targets", "ignore"} & set(listed):
            assert listed[name]["type"] == "array"
        assert all(listed[name]["type"] == "object" for name in {"options"} & set(listed))


def test_an_argument_is_described_once_in_the_first_tool_that_has_it_or_in_the_instructions() -> None:
    described = {*tools.MEASURING, *tools.TRAINING}
    for tool in tools.tools():
        request = (requests.VERBS | requests.QUERIES)[tool.name]
        for name, listed in tool.input_schema["properties"].items():
            if name in described and name not in (requests.technique_field(request), "options"):
                assert set(listed) <= {"type", "items"}, f"{tool.name}: {name}"
            elif (fields := _fields_of(request, name)) and all(short_text(field) for field in fields):
                assert listed["description"], name
            described.add(name)


@pytest.mark.parametrize("verb", requests.VERBS)
def test_a_rare_argument_is_named_in_the_options_of_a_tool_or_in_the_instructions(verb: str) -> None:
    named = " ".join(
        tool.input_schema["properties"].get("options", {}).get("description", "") for tool in tools.tools()
    )
    for name in tools.options_of(verb):
        shown = tools.INSTRUCTIONS if name in (*tools.MEASURING, *tools.TRAINING) else named
        assert re.search(rf"(- |[ ,]){name}[=:, (.]", shown), name


@pytest.mark.parametrize("verb", requests.VERBS)
def test_an_argument_is_rare_with_every_technique_of_a_verb_or_with_none(verb: str) -> None:
    request = requests.VERBS[verb]
    names = {
        *request.model_fields,
        *(name for one in requests.techniques(request).values() for name in one.model_fields),
    }
    for name in names:
        assert len({is_rare(field) for field in _fields_of(request, name)}) == 1, name


@pytest.mark.parametrize("verb", [*requests.VERBS, *requests.QUERIES])
def test_a_short_text_is_no_longer_than_the_description(verb: str) -> None:
    request = (requests.VERBS | requests.QUERIES)[verb]
    choices = {"scheme", "method", "student", "action", "runtime"}
    names = {
        *request.model_fields,
        *(name for one in requests.techniques(request).values() for name in one.model_fields),
    }
    for name in names - choices:
        for field in _fields_of(request, name):
            assert len(short_text(field)) <= len(field.description or ""), name


def _names_of(request: type[requests.Request]) -> set[str]:
    return set(request.model_fields).union(*(one.model_fields for one in requests.techniques(request).values()))


def _fields_of(request: type[requests.Request], name: str) -> list[FieldInfo]:
    models = (request, *requests.techniques(request).values())
    return [model.model_fields[name] for model in models if name in model.model_fields]


def test_choices_that_differ_between_techniques_are_all_listed() -> None:
    listed = next(tool for tool in tools.tools() if tool.name == "quantize").input_schema["properties"]
    assert listed["num_bits"]["enum"] == [4, 8]


@pytest.mark.parametrize("era", ERAS)
async def test_the_slash_commands_are_prompts_with_their_arguments_put_in(era: str, project: Path) -> None:
    async with connected(project, era) as client:
        prompts = (await client.list_prompts()).prompts
        assert {prompt.name for prompt in prompts} == {path.stem for path in (ROOT / "commands").glob("*.md")}
        got = await client.get_prompt("quantize", {"arguments": "net.py:build --plan"})
        with pytest.raises(MCPError, match="Did you mean 'quantize'"):
            await client.get_prompt("quantise")
    content = got.messages[0].content
    assert isinstance(content, TextContent)
    assert "net.py:build --plan" in content.text
    assert "$ARGUMENTS" not in content.text
    assert not content.text.startswith("---")
    assert all(prompt.description for prompt in prompts)


def test_a_command_that_takes_no_arguments_gets_them_appended() -> None:
    assert Command("c", "", "", "Do it.").text("now") == "Do it.\n\nARGUMENTS: now"
    assert Command("c", "", "", "Do it.").text("") == "Do it."
    assert all(command.argument_hint.strip("\"'") == command.argument_hint for command in commands())


# What it answers


BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("quantize", {"model": "m", "bits": 4}),
    ("quantize", {}),
    ("quantize", {"model": "m", "scheme": "statik"}),
    ("profile", {"model": "m", "batch": 0}),
    ("runs", {"action": "show"}),
    ("doctor", {"detail": "full"}),
]


async def test_an_agent_cannot_allow_itself_another_folder_and_the_user_can(project: Path) -> None:
    arguments = {"model": "net.py:Net", "allow_path": ["/etc"]}
    async with connected(project) as client:
        refused = await client.call_tool("profile", arguments)
    assert refused.is_error
    assert "OMGOPTIM_ALLOW_PATH" in refused.structured_content["error"]["fix"]


@pytest.mark.parametrize("era", ERAS)
async def test_a_bad_request_is_refused_in_the_words_of_the_request(era: str, project: Path) -> None:
    async with connected(project, era) as client:
        for tool, raw in BAD_REQUESTS:
            with pytest.raises(RequestError) as refused:
                requests.parse(tool, raw)
            result = await client.call_tool(tool, raw)
            assert result.is_error
            error = result.structured_content["error"]
            assert refused.value.what in text_of(result)
            assert error["what"] == refused.value.what
            if (
                "has no argument" in error["what"]
            ):  # the names that are known differ: wait_s here, allow_path in a shell
                assert "wait_s" in error["why"] or tool == "doctor"
                assert "allow_path" not in error["why"]
            else:
                assert error == refused.value.to_dict()
            assert "pydantic" not in text_of(result)
    assert not (project / ".omgoptim").exists()


async def test_the_arguments_of_the_face_are_checked_before_anything_starts(project: Path) -> None:
    async with connected(project) as client:
        for raw in ({"wait_s": -1}, {"wait_s": "long"}, {"detail": "long"}):
            result = await client.call_tool("profile", {"model": "sleeper.py:build", "inputs": ["1x3"], **raw})
            assert result.is_error
            assert next(iter(raw)) in text_of(result)
        unknown = await client.call_tool("prunes", {})
    assert not (project / ".omgoptim").exists()
    assert "there is no tool 'prunes'" in text_of(unknown)


async def test_what_is_rarely_needed_may_stand_in_options_or_beside_the_rest(project: Path) -> None:
    rest = {"model": "m", "inputs": ["1x3"], "method": "magnitude"}
    async with connected(project) as client:
        for raw in ({"options": {"warmup": 2}}, {"warmup": 2}):
            refused = await client.call_tool("prune", rest | raw)
            assert "'warmup' of prune is not valid" in text_of(refused)
        twice = await client.call_tool("prune", rest | {"options": {"seed": 1}, "seed": 2})
        unknown = await client.call_tool("prune", rest | {"options": {"learnin_rate": 1}})
        shell = await client.call_tool("prune", rest | {"options": {"allow_path": ["/etc"]}})
        no_object = await client.call_tool("prune", rest | {"options": "seed=1"})
    assert "'seed' is given twice" in text_of(twice)
    assert "Did you mean 'learning_rate'" in text_of(unknown)
    assert "OMGOPTIM_ALLOW_PATH" in text_of(shell)
    assert "it is not an object" in text_of(no_object)
    assert not (project / ".omgoptim").exists()


async def test_a_next_step_has_the_form_that_the_list_of_tools_asks_for(project: Path) -> None:
    arguments = {"model": "net.py:build", "method": "magnitude", "epochs": 4, "timing": "careful", "warmup": 0.1}
    step = NextStep(tool="prune", arguments=arguments, command="omgoptim prune …", why="more epochs")
    folder = by_hand.finished_run(project, by_hand.report(next_steps=[step]))
    async with connected(project) as client:
        listed = {tool.name: tool for tool in (await client.list_tools()).tools}
        answer = await client.call_tool("runs", {"action": "show", "run_id": folder.id})
    (step,) = answer.structured_content["next_steps"]
    jsonschema.validate(step["arguments"], listed["prune"].input_schema)
    assert step["arguments"]["options"] == {"timing": "careful", "warmup": 0.1}
    assert '"options": {"timing": "careful", "warmup": 0.1}' in text_of(answer)


@pytest.mark.parametrize("era", ERAS)
async def test_a_finished_run_is_answered_twice_each_time_complete(era: str, project: Path) -> None:
    sent = by_hand.report()
    folder = by_hand.finished_run(project, sent)
    async with connected(project, era) as client:
        short = await client.call_tool("runs", {"action": "show", "run_id": folder.id})
        full = await client.call_tool("runs", {"action": "wait", "run_id": folder.id[-4:], "detail": "full"})
    assert list(short.structured_content)[:4] == ["outcome", "summary", "warnings", "next_steps"]
    assert len(json.dumps(short.structured_content)) <= 8_000
    assert len(text_of(short)) <= 8_000
    for needed in (sent.summary, sent.warnings[0], sent.next_steps[0].command, folder.id, str(folder.report_file)):
        assert needed in json.dumps(short.structured_content, ensure_ascii=False)
        assert needed in text_of(short)
    files = full.structured_content.pop("files")
    assert full.structured_content == json.loads(folder.report_file.read_text())
    assert files["page"] == str(folder.html_file)


async def test_a_failed_run_is_an_error_without_control_characters(project: Path) -> None:
    folder = by_hand.failed_run(project)
    async with connected(project) as client:
        result = await client.call_tool("runs", {"action": "wait", "run_id": folder.id})
    assert result.is_error
    assert result.structured_content["run_id"] == folder.id
    assert result.structured_content["error"]["fix"] == "a way out"
    assert "Fix: a way out" in text_of(result)
    assert "\x1b" not in text_of(result) + result.structured_content["error"]["what"]


async def test_the_runs_of_a_project_are_listed_newest_first_and_bounded(project: Path) -> None:
    folders = [by_hand.failed_run(project) for _ in range(12)]
    async with connected(project) as client:
        result = await client.call_tool("runs", {"project": str(project)})
        elsewhere = await client.call_tool("runs", {"project": str(project / "missing")})
    listed = [state["run_id"] for state in result.structured_content["runs"]]
    assert len(listed) == 10
    assert set(listed) < {folder.id for folder in folders}
    assert result.structured_content["summary"].startswith("12 runs in")
    assert "2 older ones" in text_of(result)
    assert elsewhere.is_error


@pytest.mark.parametrize("era", ERAS)
async def test_the_report_of_a_run_is_a_resource(era: str, project: Path) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    async with connected(project, era) as client:
        templates = (await client.list_resource_templates()).resource_templates
        assert [template.uri_template for template in templates] == ["omgoptim://runs/{run_id}/report"]
        (listed,) = (await client.list_resources()).resources
        (content,) = (await client.read_resource(str(listed.uri))).contents
        with pytest.raises(MCPError, match="there is no run 'nope'"):
            await client.read_resource("omgoptim://runs/nope/report")
    assert isinstance(content, TextResourceContents)
    assert content.text.startswith("**OK**")
    assert folder.id in content.text


async def test_doctor_says_what_the_python_of_the_project_has(project: Path) -> None:
    async with connected(project) as client:
        result = await client.call_tool("doctor", {})
    assert not result.is_error
    assert result.structured_content["project"] == str(project)
    assert result.structured_content["summary"] in text_of(result)


# Waiting


@pytest.mark.parametrize("era", ERAS)
async def test_a_run_outlives_its_call_and_is_waited_for_and_cancelled_with_the_calls_it_names(
    era: str, project: Path
) -> None:
    async with connected(project, era, OMGOPTIM_MAX_WAIT_S="0.5") as client:
        first = await client.call_tool("profile", {"model": "sleeper.py:build", "inputs": ["1x3"], "wait_s": 0})
        assert not first.is_error
        assert list(first.structured_content)[:4] == ["status", "summary", "warnings", "next_steps"]
        (step,) = first.structured_content["next_steps"]
        assert step["arguments"]["project"] == str(project)
        assert step["arguments"]["wait_s"] == 0.5
        assert step["arguments"]["run_id"] in text_of(first)
        again = await client.call_tool(step["tool"], step["arguments"])
        assert again.structured_content["status"] in ("starting", "queued", "running")
        assert again.structured_content["run_id"] == first.structured_content["run_id"]
        ended = await client.call_tool("runs", {"action": "cancel", "run_id": again.structured_content["run_id"]})
    assert ended.structured_content["status"] == "cancelled"
    assert [state.status for state in list_runs(project)] == ["cancelled"]


async def test_cancelling_the_call_leaves_the_run_and_the_server_alone(project: Path) -> None:
    async with connected(project) as client:
        with anyio.CancelScope() as scope:

            async def stop(progress: float, total: float | None, message: str | None) -> None:
                assert message
                scope.cancel()

            raw = {"model": "sleeper.py:build", "inputs": ["1x3"]}
            await client.call_tool("profile", raw, progress_callback=stop)
        assert scope.cancelled_caught
        listed = await client.call_tool("runs", {})
    (state,) = listed.structured_content["runs"]
    assert state["status"] in ("starting", "queued", "running")


async def test_waiting_reports_progress_that_grows_even_when_nothing_changes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = by_hand.running_run(project)
    monkeypatch.setattr(waiting, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(waiting, "INTERVAL_S", 0.01)
    sent: list[tuple[float, str | None]] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        assert total == 100
        sent.append((progress, message))

    state = await waiting.wait_for(folder, 0.2, report)
    assert state.status == read_state(folder).status == "running"
    assert len(sent) > 2
    assert [progress for progress, _ in sent] == sorted({progress for progress, _ in sent})
    assert sent[0] == (40.0, "measuring, 40%, 12 s left")
    assert waiting.HEARTBEAT_S < 10


@pytest.mark.parametrize(
    ("limit", "given", "seconds"),
    [("", None, 45), ("", 300, 55), ("20", None, 20), ("1500", None, 45), ("1500", 1200, 1200), ("soon", 50, 50)],
)
def test_a_wait_is_as_long_as_asked_up_to_what_the_client_bears(
    limit: str, given: float | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMGOPTIM_MAX_WAIT_S", limit)
    assert waiting.wait_seconds(given) == seconds
    cap = waiting.cap_warning(given)
    assert (cap is not None) == (given is not None and given > seconds)
    assert cap is None or f"above the longest wait of a call, {seconds:g} s" in cap


def test_a_client_that_asks_for_progress_may_wait_longer_if_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMGOPTIM_MAX_WAIT_S", raising=False)
    assert (waiting.wait_seconds(300, progress=True), waiting.cap_warning(300, progress=True)) == (300, None)
    assert waiting.wait_seconds(None, progress=True) == 45
    assert "longest wait of a call, 600 s" in str(waiting.cap_warning(5000, progress=True))
    monkeypatch.setenv("OMGOPTIM_MAX_WAIT_S", "20")
    assert waiting.wait_seconds(300, progress=True) == 20


# The process


INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}


def call(number: int, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    params = {"name": tool, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while a call waits"])
def test_the_first_byte_is_protocol_and_the_server_ends_with_its_input(busy: bool, project: Path) -> None:
    folder = by_hand.running_run(project)
    with subprocess.Popen(
        [sys.executable, "-m", "omgoptim.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=project,
        env=environment(project),
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(INITIALIZE) + "\n")
        server.stdin.flush()
        assert json.loads(server.stdout.readline())["result"]["serverInfo"]["name"] == "omgoptim"
        if busy:
            ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
            wait = call(2, "runs", {"action": "wait", "run_id": folder.id, "wait_s": 50})
            wait["params"]["_meta"] = {"progressToken": 7}
            server.stdin.write(json.dumps(ready) + "\n" + json.dumps(wait) + "\n")
            server.stdin.flush()
            assert json.loads(server.stdout.readline())["method"] == "notifications/progress"
        server.stdin.close()
        assert server.wait(timeout=20) == 0


@pytest.mark.skipif(os.name != "posix", reason="an interrupt is sent as a POSIX signal")
def test_an_interrupt_ends_the_server_though_its_input_is_open(project: Path) -> None:
    command = [sys.executable, "-m", "omgoptim.server"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=project, env=environment(project), text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(INITIALIZE) + "\n")
        server.stdin.flush()
        assert server.stdout.readline()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) == -signal.SIGINT


def test_the_server_loads_nothing_heavy() -> None:
    code = (
        "import sys; from omgoptim.server.handlers import build_server; from omgoptim.server import tools;"
        "build_server(); tools.tools(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(ROOT)
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "mcp" in loaded
    assert loaded & {"torch", "numpy", "rich", "typer", "onnx", "onnxruntime"} == set()


# HTTP


@contextmanager
def http_server(project: Path, token: str = "") -> Iterator[tuple[int, str]]:
    """A server over HTTP: its port, and what it said about its token."""
    command = [sys.executable, "-m", "omgoptim.cli", "mcp", "--http", "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=project,
        env=environment(project, OMGOPTIM_TOKEN=token),
        text=True,
    ) as server:
        try:
            assert server.stderr is not None
            port = re.search(r"http://127\.0\.0\.1:(\d+)/mcp", server.stderr.readline())
            assert port
            yield int(port[1]), server.stderr.readline().removeprefix("Bearer token: ").strip()
        finally:
            server.terminate()
            out, _ = server.communicate(timeout=20)
    assert out == ""


def status_of(port: int, headers: dict[str, str]) -> int:
    """The status of an `initialize` sent with these headers."""
    sent = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest("POST", "/mcp", skip_host="Host" in sent)
        body = json.dumps(INITIALIZE).encode()
        for name, value in (sent | {"Content-Length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status
    finally:
        connection.close()


def test_http_wants_the_token_a_local_host_and_a_local_origin(project: Path) -> None:
    with http_server(project, "token-0123456789") as (port, sent):
        assert sent == "the one in $OMGOPTIM_TOKEN"
        good = {"Authorization": "Bearer token-0123456789"}
        assert status_of(port, {}) == 401
        assert status_of(port, {"Authorization": "Bearer wrong"}) == 401
        assert status_of(port, {"Authorization": "Basic token-0123456789"}) == 401
        assert status_of(port, good | {"Host": "evil.example"}) == 421
        assert status_of(port, good | {"Host": f"127.0.0.1:{port}", "Origin": "http://evil.example"}) == 403
        assert status_of(port, good | {"Origin": f"http://localhost:{port}"}) == 200
        assert status_of(port, good) == 200


def test_http_makes_a_token_where_none_is_given(project: Path) -> None:
    with http_server(project) as (port, token):
        assert len(token) >= 32
        assert status_of(port, {"Authorization": f"Bearer {token}"}) == 200
