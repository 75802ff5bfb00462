"""The JSON schema of a tool's arguments, made small, because a tool list is paid for in every conversation.

Titles, nulls, bounds (`requests.parse` checks them) and empty defaults are left out. A technique's parameters stand
beside the common arguments, each once, with the techniques that have it. Arguments that every verb shares and that are
rarely given (`TOLD_ONCE`) are described in the server's instructions, once for all tools.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from omgoptim.requests import ModelRequest, Params, Request, technique_field, techniques

Json = dict[str, Any]

TOLD_ONCE = ("timing", "device", "batch", "threads", "samples", "seed", "time_limit_s", "python")

SHELL_ONLY = ("allow_path",)
"""What an agent may not give itself: the user sets OMGOPTIM_ALLOW_PATH in the server's environment."""

_SAYS_LITTLE = {"title", "minLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def input_schema(request: type[Request], face: Json) -> Json:
    """The schema of a verb's arguments, and of those that the face itself takes."""
    key = technique_field(request)
    properties = _properties(request)
    if key is not None:
        default = request.model_fields[key].get_default(call_default_factory=True)
        properties[key] = _choice(techniques(request), getattr(default, key))
        properties |= _technique_properties(key, techniques(request), taken=set(properties))
    for name in SHELL_ONLY:
        properties.pop(name, None)
    for name in TOLD_ONCE:
        properties.get(name, {}).pop("description", None)
    required = [name for name, field in request.model_fields.items() if field.is_required()]
    schema: Json = {"type": "object", "properties": properties | face}
    if required:
        schema["required"] = required
    return schema | {"additionalProperties": False}


def told_once() -> str:
    """The arguments that the schemas leave undescribed, one line each."""
    shared = ModelRequest.model_fields
    return "\n".join(f"- {name}: {' '.join((shared[name].description or '').split())}" for name in TOLD_ONCE)


def _properties(model: type[BaseModel]) -> dict[str, Json]:
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    return {name: _small(_resolved(value, definitions)) for name, value in schema["properties"].items()}


def _choice(kinds: dict[str, type[Params]], default: str) -> Json:
    """The technique by its name, each described in its own first sentence."""
    told = "; ".join(f"{name}: {_first_sentence(params.__doc__)}" for name, params in kinds.items())
    return {"type": "string", "enum": list(kinds), "default": default, "description": told}


def _technique_properties(key: str, kinds: dict[str, type[Params]], taken: set[str]) -> dict[str, Json]:
    """Every parameter of every technique, once: what is not the same for all that have it is left out."""
    found: dict[str, tuple[list[str], Json]] = {}
    for kind, params in kinds.items():
        for name, schema in _properties(params).items():
            if name == key or name in taken or "const" in schema:
                continue
            holders, known = found.get(name, ([], schema))
            same = {part: value for part, value in known.items() if schema.get(part) == value or part == "description"}
            found[name] = ([*holders, kind], same)
    return {
        name: schema | {"description": f"({', '.join(holders)}) {schema.get('description', '')}".strip()}
        for name, (holders, schema) in found.items()
    }


def _resolved(schema: Json, definitions: dict[str, Json]) -> Json:
    """A property with the one definition it may refer to put in its place."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return {**definitions[name], **{k: v for k, v in schema.items() if k != "$ref"}} if name in definitions else schema


def _small(schema: Json) -> Json:
    """A property without what says nothing to a model."""
    options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    if len(options) == 1:
        schema = options[0] | {name: value for name, value in schema.items() if name != "anyOf"}
    schema = {name: value for name, value in schema.items() if name not in _SAYS_LITTLE}
    if schema.get("default") in (None, [], {}) or schema.get("default") is False:
        schema.pop("default", None)
    if schema.get("additionalProperties") is True:
        del schema["additionalProperties"]
    return schema


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".")
