"""The list of tools, and the JSON schemas of their arguments, which are small: every conversation pays for them.

Titles, nulls, bounds (`requests.parse` checks them) and empty defaults are left out. A technique's parameters stand
beside the common arguments, each once, with the techniques that have it. An argument is described where it first
appears, by its short text (`omgoptim.requests.base`), and is only named by the tools after that; its first choice is
the default. Rare arguments stand in one object, `options`; those of every verb are described in the server's
instructions.
"""

from __future__ import annotations

import typing
from typing import Any

from mcp.types import Tool, ToolAnnotations
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from omgoptim.requests import (
    GRANTS,
    QUERIES,
    TITLES,
    VERBS,
    ModelRequest,
    RecoveryRequest,
    Request,
    technique_field,
    techniques,
)
from omgoptim.requests.base import is_rare, short_text
from omgoptim.server.waiting import default_wait

Json = dict[str, Any]

SHELL_ONLY = (*GRANTS, "clean")
"""Arguments that an agent cannot give: the user sets OMGOPTIM_ALLOW_PATH and OMGOPTIM_ALLOW_MODULE for the server."""

NAMED_BY_TOOLS = ("weights", "target")
"""Rare arguments of every verb that only the first tool names: the instructions may have 2,048 characters."""

MEASURING = tuple(
    name for name, field in ModelRequest.model_fields.items() if is_rare(field) and name not in NAMED_BY_TOOLS
)
"""Rare arguments that the instructions describe."""

TRAINING = tuple(
    name
    for name, field in RecoveryRequest.model_fields.items()
    if is_rare(field) and name not in ModelRequest.model_fields
)
"""Rare arguments that the instructions list by name and choices."""

_SAYS_LITTLE = {"title", "minLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def input_schema(verb: str, request: type[Request], own: Json, described: set[str]) -> Json:
    """Return the schema of a verb's arguments, and of those that the server itself takes.

    Args:
        verb: its name.
        request: its request.
        own: schema of the arguments that the server itself takes.
        described: arguments that an earlier tool describes; those of this verb are added to it.
    """
    key = technique_field(request)
    properties = _properties(request)
    if key is not None:
        properties |= _technique_properties(key, request)
    kept = {name: schema for name, schema in properties.items() if name not in (*SHELL_ONLY, *options_of(verb))}
    listed = {
        name: _bare(schema) if name in described and name not in NAMED_BY_TOOLS else _described(schema)
        for name, schema in (kept | own).items()
    }
    if key is not None:
        listed[key] = properties[key]
    if options_of(verb):
        listed["options"] = _options(verb, described)
    described |= {*listed, *options_of(verb)} - {key}
    required = [name for name, field in request.model_fields.items() if field.is_required()]
    schema: Json = {"type": "object", "properties": listed} | ({"required": required} if required else {})
    return schema | {"additionalProperties": False}


def options_of(verb: str) -> list[str]:
    """Return the arguments of a verb that its tool takes in `options`; beside the others it takes them as well."""
    if verb not in VERBS:
        return []
    return [name for name, field in _fields(VERBS[verb]).items() if is_rare(field)]


def option_descriptions() -> str:
    """Describe `options` for the instructions: measurement line by line, training by names and choices."""
    shared = []
    for name in MEASURING:
        field = ModelRequest.model_fields[name]
        default = "" if field.default in (None, {}, []) else f"={field.default}"
        shared.append(f"- {name}{default}: {' '.join(short_text(field).split())}")
    training = []
    for name in TRAINING:
        choices = typing.get_args(RecoveryRequest.model_fields[name].annotation)
        listed = f" ({'|'.join(choices)})" if choices and isinstance(choices[0], str) else ""
        training.append(f"{name}{listed}")
    return "\n".join([*shared, f"- training: {', '.join(training)}."])


def _fields(request: type[Request]) -> dict[str, FieldInfo]:
    """Return the fields of a request, then those of its techniques, each name once."""
    fields = dict(request.model_fields)
    for params in techniques(request).values():
        fields = params.model_fields | fields
    order = [*request.model_fields, *(name for params in techniques(request).values() for name in params.model_fields)]
    return {name: fields[name] for name in order}


def _options(verb: str, described: set[str]) -> Json:
    """Return the object of rare arguments: the names that no earlier tool has, one of those of training."""
    new = [name for name in options_of(verb) if name not in described]
    if not new:
        return {"type": "object"}
    training = [name for name in new if name in TRAINING and "options" in described]
    listed = [name for name in new if name not in training]
    words = f"Training parameters such as {training[0]}. " if training else ""
    return {"type": "object", "description": words + (f"Rare: {', '.join(listed)}." if listed else "")}


def _described(schema: Json) -> Json:
    """Return an argument where it first appears: its choices or default or type, and its text."""
    text = schema.get("description", "")
    small = {part: value for part, value in schema.items() if part not in ("description", "holders")}
    if "enum" in small and small["enum"][0] == small.get("default"):
        small.pop("default")
    if "enum" in small or (small.get("default") is not None and small.get("type") != "boolean"):
        small.pop("type", None)
    return small | ({"description": f"{schema.get('holders', '')} {text}".strip()} if text else {})


def _bare(schema: Json) -> Json:
    """Return an argument that an earlier tool describes: its type where a client might guess another."""
    return {"type": schema["type"]} if schema.get("type") in ("array", "object") else {}


def _properties(model: type[BaseModel]) -> dict[str, Json]:
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    small = {name: _small(_resolved(value, definitions)) for name, value in schema["properties"].items()}
    return {name: each | {"description": short_text(model.model_fields[name])} for name, each in small.items()}


def _technique_properties(key: str, request: type[Request]) -> dict[str, Json]:
    """Return the choice of a technique, and every parameter of every technique once, with all choices it may have.

    A parameter that fewer than half of the techniques have names them.
    """
    kinds = techniques(request)
    field = request.model_fields[key]
    default = getattr(field.get_default(call_default_factory=True), key)
    open_to_sources = any(params.by_source for params in kinds.values())
    named: Json = {"type": "string"} if open_to_sources else {"enum": list(kinds)}
    first_is_default = named.get("enum", [None])[0] == default
    choice = named | ({} if first_is_default else {"default": default}) | {"description": short_text(field)}
    found: dict[str, tuple[list[str], Json]] = {}
    for kind, params in kinds.items():
        for name, schema in _properties(params).items():
            loaded = params.by_source and name == "source"
            if name == key or name in request.model_fields or "const" in schema or loaded:
                continue
            holders, known = found.get(name, ([], schema))
            same = {part: value for part, value in known.items() if schema.get(part) == value or part == "description"}
            if "enum" in schema:
                same["enum"] = [*known["enum"], *(value for value in schema["enum"] if value not in known["enum"])]
            found[name] = ([*holders, kind], same)
    return {key: choice} | {
        name: schema | ({"holders": f"({', '.join(holders)})"} if len(holders) < len(kinds) / 2 else {})
        for name, (holders, schema) in found.items()
    }


def _resolved(schema: Json, definitions: dict[str, Json]) -> Json:
    """Return a property with its definition inlined."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return {**definitions[name], **{k: v for k, v in schema.items() if k != "$ref"}} if name in definitions else schema


def _small(schema: Json) -> Json:
    """Return a property without entries that a model does not need."""
    options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    if len(options) == 1:
        schema = options[0] | {name: value for name, value in schema.items() if name != "anyOf"}
    schema = {name: value for name, value in schema.items() if name not in _SAYS_LITTLE}
    if schema.get("default") in (None, [], {}) or schema.get("default") is False:
        schema.pop("default", None)
    if schema.get("additionalProperties") is True:
        del schema["additionalProperties"]
    return schema


_RUNS_CODE = "Runs code with the user's rights."

OUTPUT_SCHEMA: dict[str, Any] = {"type": "object"}
"""Schema of every answer: an object with a `summary`, or with an `error`."""

INSTRUCTIONS = f"""\
omgoptim makes a PyTorch model smaller and faster. Every number is measured on the saved artifact, reopened in a fresh
process. As small and fast as possible, or to a target: optimize. Step by step: profile, then quantize (scheme and
runtime auto); if not enough, prune, factorize or distill, and quantize the result. An answer begins with outcome and
summary: report both, with warnings and intervals, and follow next_steps. Always give project, the absolute
path of the project. Its code runs with the user's rights in the project's Python.

If a run takes longer than the call, the answer has its status and a run_id: call runs with action wait. The run
continues if the client disconnects. Something missing: call doctor.

An argument without description means the same as in an earlier tool; the first choice is the default.
wait_s: seconds to wait for the result. detail: full for the whole report. options: rarely needed arguments (=default):
{option_descriptions()}"""


def tools() -> list[Tool]:
    """Return the tools, in a fixed order."""
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
        input_schema=input_schema(name, request, {} if name == "doctor" else _own_arguments(), described),
        output_schema=OUTPUT_SCHEMA,
        annotations=ToolAnnotations(
            read_only_hint=name == "doctor",
            destructive_hint=False,
            open_world_hint=runs_code,
        ),
    )


def _own_arguments() -> dict[str, Any]:
    return {
        "wait_s": {"type": "number", "default": default_wait()},
        "detail": {"type": "string", "enum": ["brief", "full"], "default": "brief"},
    }
