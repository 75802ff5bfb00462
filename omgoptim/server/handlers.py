"""Tool calls: parse, submit, wait, answer."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any, cast

from anyio.to_thread import run_sync
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.types import CallToolRequestParams, CallToolResult, ListToolsResult, PaginatedRequestParams

from omgoptim import __version__, requests
from omgoptim.errors import OmgoptimError, RequestError, did_you_mean
from omgoptim.jobs.actions import cancel, pick, resume
from omgoptim.jobs.doctor import doctor
from omgoptim.jobs.folder import RunFolder, find_run
from omgoptim.jobs.follow import read_live
from omgoptim.jobs.states import ENDED, list_runs, load_report
from omgoptim.jobs.submit import submit
from omgoptim.render import runs
from omgoptim.reports import EfficiencyReport
from omgoptim.requests.limits import shortened
from omgoptim.server import answers, app, documents
from omgoptim.server.permissions import refuse_shell_only, refuse_to_resume, resolve_call
from omgoptim.server.tools import INSTRUCTIONS, SHELL_ONLY, options_of, tools
from omgoptim.server.waiting import cap_warning, longest_wait, wait_for, wait_seconds
from omgoptim.text import clean

Context = ServerRequestContext[Any, Any]

_log = logging.getLogger(__name__)


def build_server() -> Server[Any]:
    """Return the server with its tools, prompts and resources."""
    server: Server[Any] = Server(
        "omgoptim",
        version=__version__,
        title="omgoptim: smaller, faster PyTorch models",
        instructions=INSTRUCTIONS,
        on_list_tools=_list_tools,
        on_call_tool=_call_tool,
        on_list_prompts=documents.list_prompts,
        on_get_prompt=documents.get_prompt,
        on_list_resources=documents.list_resources,
        on_list_resource_templates=documents.list_resource_templates,
        on_read_resource=documents.read_resource,
    )
    server.extensions[app.EXTENSION] = {}
    return server


async def _list_tools(context: Context, _params: PaginatedRequestParams | None) -> ListToolsResult:
    listed = tools()
    return ListToolsResult(tools=app.with_app_page(listed) if app.supports_apps(context) else listed)


async def _call_tool(context: Context, params: CallToolRequestParams) -> CallToolResult:
    """Answer a call. Any failure becomes an answer that says what to do; the server continues."""
    try:
        return await _answer(context, params.name, dict(params.arguments or {}))
    except OmgoptimError as error:
        return await _failed(context, error)
    except Exception as error:  # the outermost frame of a call  # noqa: BLE001
        _log.exception("tool %s failed", params.name)
        fault = OmgoptimError(
            f"omgoptim itself failed: {error}", type(error).__name__, "see the server's standard error"
        )
        return answers.error_answer(fault)


async def _failed(
    context: Context, error: OmgoptimError, run_id: str | None = None, status: str = "failed"
) -> CallToolResult:
    answer = answers.error_answer(error, run_id)
    return await app.answer_with(context, answer, lambda: runs.error_document(error, run_id, status))


async def _answer(context: Context, name: str, arguments: dict[str, Any]) -> CallToolResult:
    known = requests.VERBS | requests.QUERIES
    if name not in known:
        raise RequestError(f"there is no tool '{clean(name, 80)}'", did_you_mean(name, known))
    requests.refuse_unusable(arguments)
    _spread_options(arguments)
    own = {key: arguments.pop(key) for key in ("wait_s", "detail") if name != "doctor" and key in arguments}
    refuse_shell_only(arguments)
    _refuse_unknown(name, arguments)
    request = requests.parse(name, arguments)
    progress = "progress_token" in (context.meta or {})
    wait_s, detail = wait_seconds(own.get("wait_s"), progress), _detail(own.get("detail"))
    cap = cap_warning(own.get("wait_s"), progress)
    project, request = await run_sync(resolve_call, request)
    if isinstance(request, requests.DoctorRequest):
        found = request.model_copy(update={"project": str(project)})
        return answers.doctor_answer(await run_sync(doctor, found))
    if isinstance(request, requests.RunsRequest):
        return await _runs(context, request, project, wait_s, detail, cap)
    folder = await run_sync(submit, name, request, project)
    return await _wait_and_answer(context, folder, wait_s, detail, cap)


async def _runs(
    context: Context,
    request: requests.RunsRequest,
    project: Path,
    wait_s: float,
    detail: answers.Detail,
    cap: str | None,
) -> CallToolResult:
    if request.action == "list":
        states = await run_sync(list_runs, project)
        answer = answers.runs_answer(states, project)
        return await app.answer_with(
            context, answer, lambda: runs.runs_document(states[: answers.LISTED], str(project))
        )
    folder = await run_sync(find_run, project, request.run_id or "")
    if request.action == "cancel":
        ended = await run_sync(cancel, folder)
        return await app.answer_with(context, answers.cancelled_answer(ended), lambda: runs.ended_document(ended))
    if request.action == "resume":
        await run_sync(refuse_to_resume, folder, project)
        await run_sync(resume, folder)
    if request.action == "pick":
        return await _reported(context, await run_sync(pick, folder, request.name or ""), folder, detail)
    waits = request.action in ("wait", "resume")
    return await _wait_and_answer(context, folder, wait_s if waits else 0, detail, cap if waits else None)


async def _wait_and_answer(
    context: Context, folder: RunFolder, wait_s: float, detail: answers.Detail, cap: str | None
) -> CallToolResult:
    """Wait for a run; return its report, its error, or its state if it has not ended in time."""
    state = await wait_for(folder, wait_s, context.session.report_progress)
    if state.status not in ENDED:
        project = folder.path.parents[2]
        answer = answers.unfinished_answer(state, project, longest_wait(), cap)
        return await app.answer_with(context, answer, lambda: runs.live_document(read_live(folder), str(project)))
    try:
        return await _reported(context, await run_sync(load_report, folder), folder, detail)
    except OmgoptimError as error:
        return await _failed(context, error, folder.id, "cancelled" if state.status == "cancelled" else "failed")


async def _reported(
    context: Context, report: EfficiencyReport, folder: RunFolder, detail: answers.Detail
) -> CallToolResult:
    report = answers.with_listed_options(report)
    answer = answers.report_answer(report, folder, detail)
    return await app.answer_with(context, answer, lambda: app.finished_document(report, str(folder.path.parents[2])))


def _spread_options(arguments: dict[str, Any]) -> None:
    """Merge `options` into the arguments, where `requests.parse` expects them."""
    options = arguments.pop("options", None) or {}
    if not isinstance(options, dict):
        fix = "give an object of arguments, or leave it out"
        raise RequestError(f"{shortened(options)} is not a value of options", "it is not an object", fix)
    twice = [key for key in options if key in arguments]
    if twice:
        raise RequestError(
            f"'{clean(twice[0], 80)}' is given twice", "both as an argument and in options", "give it once"
        )
    arguments.update(options)


def _refuse_unknown(name: str, arguments: dict[str, Any]) -> None:
    """Refuse an unknown argument, with the names that an agent may use."""
    known, of_techniques = _known_arguments(name)
    for given in arguments:
        if given not in known and given not in of_techniques and given not in SHELL_ONLY:
            raise requests.unknown_argument(given, name, known)


@cache
def _known_arguments(name: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the arguments that the list of tools has for one, and those of its techniques; they never change."""
    tool = next(tool for tool in tools() if tool.name == name)
    kinds = requests.techniques((requests.VERBS | requests.QUERIES)[name]).values()
    of_techniques = frozenset(field for params in kinds for field in params.model_fields)
    return (*tool.input_schema["properties"], *options_of(name)), of_techniques


def _detail(given: Any) -> answers.Detail:
    if given not in (None, "brief", "full"):
        raise RequestError(f"{shortened(given)} is not a value of detail", "Known: brief, full.")
    return cast(answers.Detail, given or "brief")
