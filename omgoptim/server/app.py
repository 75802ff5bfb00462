"""The report as a page in a chat (MCP Apps), for clients that declare this capability; it adds no tool.

The page is one resource without data; an answer has its data in `_meta`, which no model reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from anyio.to_thread import run_sync
from mcp.server.context import ServerRequestContext
from mcp.types import CallToolResult, TextResourceContents, Tool

from omgoptim.errors import OmgoptimError
from omgoptim.render.document import Action, Document, call_text, document_json, report_document
from omgoptim.render.html import app_html
from omgoptim.reports import EfficiencyReport, NextStep
from omgoptim.requests import GRANTS, QuantizeRequest, parse
from omgoptim.requests.command import arguments_of

EXTENSION = "io.modelcontextprotocol/ui"
MIME_TYPE = "text/html;profile=mcp-app"
URI = "ui://omgoptim/report.html"
META = "omgoptim/page"
"""Key of an answer's `_meta` that holds the page's data."""
MAX_PAGE_BYTES = 60_000
"""Bytes of the data of an answer. Chosen: hosts pass an answer on as one message."""
MAX_PICKS = 5
"""Most buttons that pick another finalist. Chosen: one row of buttons."""

Context = ServerRequestContext[Any, Any]


def supports_apps(context: Context) -> bool:
    """Return whether the client says that it shows pages of this kind."""
    capabilities = context.session.client_capabilities
    settings = ((capabilities.extensions if capabilities else None) or {}).get(EXTENSION)
    kinds = settings.get("mimeTypes") if isinstance(settings, dict) else None
    return isinstance(kinds, list) and MIME_TYPE in kinds


def with_app_page(tools: Sequence[Tool]) -> list[Tool]:
    """Return the tools with the page that shows their answers; hosts of before 2026 read the flat key."""
    bound = {"ui": {"resourceUri": URI}, "ui/resourceUri": URI}
    return [tool if tool.name == "doctor" else tool.model_copy(update={"meta": bound}) for tool in tools]


def page_contents() -> TextResourceContents:
    """Return the page as a resource."""
    return TextResourceContents(uri=URI, mime_type=MIME_TYPE, text=app_html())


async def answer_with(context: Context, result: CallToolResult, document: Callable[[], Document]) -> CallToolResult:
    """Return an answer with the data of its page, where the client shows one."""
    if not supports_apps(context):
        return result
    page = await run_sync(lambda: json.loads(document_json(document(), MAX_PAGE_BYTES)))
    return result.model_copy(update={"meta": {META: page}})


def finished_document(report: EfficiencyReport, project: str) -> Document:
    """Return a report with buttons for its next steps."""

    def ask(step: NextStep) -> str:
        return call_text(step.tool, {**step.arguments, "project": project})

    return report_document(report, _actions(report, project), ask)


def _actions(report: EfficiencyReport, project: str) -> list[Action]:
    """Return what else can be done with this run: pick another finalist, search longer."""
    kept = [one for one in report.alternatives if one.holds][:MAX_PICKS]
    actions = [
        Action(
            f"Pick {one.name}",
            call_text("runs", {"action": "pick", "run_id": report.run_id, "name": one.name, "project": project}),
        )
        for one in kept
    ]
    longer = _with_most_effort(report)
    if longer is not None:
        actions.append(Action("Repeat with effort best", call_text("quantize", longer | {"project": project})))
    return actions


def _with_most_effort(report: EfficiencyReport) -> dict[str, Any] | None:
    """Return the arguments of the same run with the most effort; None if an agent cannot make such a call."""
    if report.verb != "quantize" or not report.repeat.startswith("omgoptim quantize "):
        return None
    try:
        request = parse("quantize", report.request)
    except OmgoptimError:
        return None
    granted = any(getattr(request, name) for name in GRANTS)
    if granted or not isinstance(request, QuantizeRequest) or request.effort == "best" or request.plan:
        return None
    return arguments_of(request) | {"effort": "best"}
