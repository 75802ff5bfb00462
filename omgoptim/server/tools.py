"""The tools as a client lists them: in a fixed order, small."""

from __future__ import annotations

from typing import Any

from mcp.types import Tool, ToolAnnotations

from omgoptim.requests import QUERIES, TITLES, VERBS
from omgoptim.server.schema import input_schema, option_descriptions
from omgoptim.server.waiting import default_wait

_RUNS_CODE = "Runs code with the user's rights."

OUTPUT_SCHEMA: dict[str, Any] = {"type": "object"}
"""Every answer is an object whose `summary` says it in words; an error has `error` instead."""

INSTRUCTIONS = f"""\
omgoptim makes a PyTorch model smaller and faster, and proves it: every number is measured on the saved artifact,
reopened in a fresh process. For a goal, or as far as it gets: optimize. By hand: profile, then quantize (scheme and
runtime auto); if not enough, prune, factorize or distill, and quantize the result. An answer begins with outcome and
summary: report both, with warnings and intervals, and follow next_steps. Always give project, the absolute
path of the user's project. Its code runs with the user's rights in the project's Python.

If a run takes longer than the call, the answer has its status and a run_id: call runs with action wait. The run goes on
if the client disconnects. Something missing: call doctor.

An argument without description means the same as in an earlier tool; the first choice is the default.
wait_s: seconds to wait for the result. detail: full for the whole report. options: rarely needed arguments (=default):
{option_descriptions()}"""


def tools() -> list[Tool]:
    """The tools, in a fixed order."""
    described: set[str] = set()
    return [_tool(name, described) for name in (*VERBS, *QUERIES)]


def _tool(name: str, described: set[str]) -> Tool:
    request = (VERBS | QUERIES)[name]
    runs_code = name in VERBS
    description = " ".join((request.__doc__ or "").split())
    if runs_code and _RUNS_CODE not in description:
        description = f"{description} {_RUNS_CODE}"
    return Tool(
        name=name,
        title=TITLES[name],
        description=description,
        input_schema=input_schema(name, request, {} if name == "doctor" else _face_arguments(), described),
        output_schema=OUTPUT_SCHEMA,
        annotations=ToolAnnotations(
            read_only_hint=name == "doctor",
            destructive_hint=False,
            open_world_hint=runs_code,
        ),
    )


def _face_arguments() -> dict[str, Any]:
    return {
        "wait_s": {"type": "number", "default": default_wait()},
        "detail": {"type": "string", "enum": ["brief", "full"], "default": "brief"},
    }
