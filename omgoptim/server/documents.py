"""Prompts and resources of the server: the slash commands, commands/*.md, and the reports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from mcp.server.context import ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp.types import (
    INVALID_PARAMS,
    GetPromptRequestParams,
    GetPromptResult,
    ListPromptsResult,
    ListResourcesResult,
    ListResourceTemplatesResult,
    PaginatedRequestParams,
    Prompt,
    PromptArgument,
    PromptMessage,
    ReadResourceRequestParams,
    ReadResourceResult,
    Resource,
    ResourceTemplate,
    TextContent,
    TextResourceContents,
)

import omgoptim
from omgoptim.errors import OmgoptimError, did_you_mean
from omgoptim.jobs.folder import find_run
from omgoptim.jobs.project import served_project
from omgoptim.jobs.states import list_runs, load_report
from omgoptim.render.markdown import MAX_FULL, report_markdown
from omgoptim.reports import RunState
from omgoptim.server import app
from omgoptim.text import clean, clean_block

Context = ServerRequestContext[Any, Any]
REPORT_URI = "omgoptim://runs/{run_id}/report"
_PREFIX, _SUFFIX = REPORT_URI.split("{run_id}")
_LISTED_REPORTS = 10
"""Maximum number of reports in the list of resources. Chosen: as many as runs in a list."""

MAX_ARGUMENT_CHARACTERS = 4_000
"""Characters that a prompt's arguments may have. Chosen: some paragraphs."""


async def list_prompts(_context: Context, _params: PaginatedRequestParams | None) -> ListPromptsResult:
    """List the commands as prompts."""
    return ListPromptsResult(
        prompts=[
            Prompt(
                name=command.name,
                description=command.description,
                arguments=[PromptArgument(name="arguments", description=command.argument_hint, required=False)],
            )
            for command in commands()
        ]
    )


async def get_prompt(_context: Context, params: GetPromptRequestParams) -> GetPromptResult:
    """Return the text of a command as a prompt."""
    known = {command.name: command for command in commands()}
    command = known.get(params.name)
    if command is None:
        what = f"There is no prompt '{clean(params.name, 80)}'."
        raise MCPError(code=INVALID_PARAMS, message=f"{what} {did_you_mean(params.name, known)}")
    text = command.text(clean_block((params.arguments or {}).get("arguments", ""), MAX_ARGUMENT_CHARACTERS))
    content = TextContent(type="text", text=text)
    return GetPromptResult(description=command.description, messages=[PromptMessage(role="user", content=content)])


async def list_resources(_context: Context, _params: PaginatedRequestParams | None) -> ListResourcesResult:
    """Return the newest reports of the project, if there is one."""
    try:
        states = await run_sync(_runs)
    except OmgoptimError:  # no project is known: there is nothing to list
        states = []
    done = [state for state in states if state.status == "done"][:_LISTED_REPORTS]
    return ListResourcesResult(
        resources=[
            Resource(
                uri=f"{_PREFIX}{state.run_id}{_SUFFIX}",
                name=state.run_id,
                description=clean(state.summary or "", 200),
                mime_type="text/markdown",
            )
            for state in done
        ]
    )


async def list_resource_templates(
    _context: Context, _params: PaginatedRequestParams | None
) -> ListResourceTemplatesResult:
    """List the template of report resources."""
    template = ResourceTemplate(
        uri_template=REPORT_URI,
        name="report",
        title="Report of a run",
        description="The whole report of a finished run.",
        mime_type="text/markdown",
    )
    return ListResourceTemplatesResult(resource_templates=[template])


async def read_resource(_context: Context, params: ReadResourceRequestParams) -> ReadResourceResult:
    """Return a run's report, or the page of the app."""
    uri = str(params.uri)
    if uri == app.URI:
        return ReadResourceResult(contents=[app.page_contents()])
    if not (uri.startswith(_PREFIX) and uri.endswith(_SUFFIX)):
        raise MCPError(code=INVALID_PARAMS, message=f"There is no resource {clean(uri, 200)}. Known: {REPORT_URI}")
    try:
        text = await run_sync(_report_of, uri[len(_PREFIX) : -len(_SUFFIX)])
    except OmgoptimError as error:
        raise MCPError(code=INVALID_PARAMS, message=str(error)) from None
    return ReadResourceResult(contents=[TextResourceContents(uri=uri, mime_type="text/markdown", text=text)])


def _report_of(run_id: str) -> str:
    folder = find_run(served_project(None), run_id)
    return clean_block(report_markdown(load_report(folder), "full", folder.path), MAX_FULL)


def _runs() -> list[RunState]:
    return list_runs(served_project(None))


_PACKAGE = Path(omgoptim.__file__).resolve().parent
_FRONTMATTER = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command."""

    name: str
    description: str
    argument_hint: str
    body: str

    def text(self, arguments: str) -> str:
        """Return the command's text with its arguments."""
        if "$ARGUMENTS" in self.body:
            return self.body.replace("$ARGUMENTS", arguments)
        return f"{self.body}\n\nARGUMENTS: {arguments}" if arguments else self.body


def commands() -> list[Command]:
    """Return every command, by name. They are inside an installed package, or beside the package in a checkout."""
    packaged, checkout = _PACKAGE / "_commands", _PACKAGE.parent / "commands"
    folder = packaged if packaged.is_dir() else checkout
    return [_read(path) for path in sorted(folder.glob("*.md"))]


def _read(path: Path) -> Command:
    text = path.read_text(encoding="utf-8")
    match = _FRONTMATTER.fullmatch(text)
    head, body = (match[1], match[2]) if match else ("", text)
    values = dict(re.findall(r"^([a-z-]+):[ ]*(.*)$", head, re.MULTILINE))
    header = {name: value.strip().strip("\"'") for name, value in values.items()}
    return Command(path.stem, header.get("description", ""), header.get("argument-hint", ""), body.strip())
