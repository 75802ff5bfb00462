"""The JSON schemas of the tools' arguments, made small, because a tool list is paid for in every conversation.

Titles, nulls, bounds (`requests.parse` checks them) and empty defaults are left out. A technique's parameters stand
beside the common arguments, each once, with the techniques that have it. An argument is told where it first appears,
in the short words of `words.py`, and is only named by the tools after that; the first of its choices is the default.
What every verb shares and is rarely given stands in one object, `options`, and is told in the server's instructions.
"""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel

from omgoptim.requests import VERBS, ModelRequest, Request, TrainingRequest, technique_field, techniques
from omgoptim.server.words import ARGUMENTS

Json = dict[str, Any]

MEASURING = ("timing", "device", "batch", "threads", "samples", "seed", "time_limit_s", "python")
TRAINING = (
    *("learning_rate", "optimizer", "lr_schedule", "warmup", "weight_decay", "train_batch", "accumulate", "clip_norm"),
    *("mixed_precision", "patience", "lora_rank", "lora_alpha", "temperature", "alpha"),
)
OPTIONS = (*MEASURING, *TRAINING)
"""What the tools take in the object `options`; beside the other arguments it is as welcome."""

SHELL_ONLY = ("allow_path",)
"""What an agent may not give itself: the user sets OMGOPTIM_ALLOW_PATH in the server's environment."""

_SAYS_LITTLE = {"title", "minLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def input_schema(verb: str, request: type[Request], face: Json, told: set[str]) -> Json:
    """The schema of a verb's arguments, and of those that the face itself takes.

    Args:
        told: the arguments that were told before; those of this verb are added to it.
    """
    key = technique_field(request)
    properties = _properties(request)
    if key is not None:
        properties |= _technique_properties(verb, key, request)
    kept = {name: schema for name, schema in properties.items() if name not in (*SHELL_ONLY, *options_of(verb))}
    listed = {name: _bare(schema) if name in told else _told(name, schema) for name, schema in (kept | face).items()}
    if key is not None:
        listed[key] = properties[key]
    if options_of(verb):
        listed["options"] = _options(verb, told)
    told |= {*listed, *options_of(verb)} - {key}
    required = [name for name, field in request.model_fields.items() if field.is_required()]
    whole: Json = {"type": "object", "properties": listed} | ({"required": required} if required else {})
    return whole | {"additionalProperties": False}


def options_of(verb: str) -> list[str]:
    """The arguments of a verb that its tool takes in `options`."""
    return [name for name in OPTIONS if verb in VERBS and name in VERBS[verb].model_fields]


def told_options() -> str:
    """The arguments that stand in `options`: those of measuring one line each, those of training by their names."""
    shared = []
    for name in MEASURING:
        field = ModelRequest.model_fields[name]
        default = "" if field.default is None else f"={field.default}"
        shared.append(f"- {name}{default}: {_one_line(field.description)}")
    training = []
    for name in TRAINING:
        choices = typing.get_args(TrainingRequest.model_fields[name].annotation)
        told = f" ({'|'.join(choices)})" if choices and isinstance(choices[0], str) else ""
        training.append(f"{name}{told}")
    return "\n".join([*shared, f"- of training: {', '.join(training)}."])


def _options(verb: str, told: set[str]) -> Json:
    """The object of rarely needed arguments: its names in the first tool, an example where training comes in."""
    new = [name for name in options_of(verb) if name not in told]
    if not new:
        return {"type": "object"}
    words = f"Of training too, such as {new[0]}." if "options" in told else f"Rarely needed: {', '.join(new)}."
    return {"type": "object", "description": words}


def _told(name: str, schema: Json) -> Json:
    """An argument where it first appears: its choices or default or type, and its words."""
    words = ARGUMENTS.get(name, schema.get("description", ""))
    told = {part: value for part, value in schema.items() if part not in ("description", "holders")}
    if "enum" in told and told["enum"][0] == told.get("default"):
        told.pop("default")
    if "enum" in told or (told.get("default") is not None and told.get("type") != "boolean"):
        told.pop("type", None)
    return told | ({"description": f"{schema.get('holders', '')} {words}".strip()} if words else {})


def _bare(schema: Json) -> Json:
    """An argument that was told before: its type where a client might guess another."""
    kept = ("type", "items") if schema.get("type") in ("array", "object") else ()
    return {part: schema[part] for part in kept if part in schema}


def _properties(model: type[BaseModel]) -> dict[str, Json]:
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    return {name: _small(_resolved(value, definitions)) for name, value in schema["properties"].items()}


def _technique_properties(verb: str, key: str, request: type[Request]) -> dict[str, Json]:
    """The choice of a technique, and every parameter of every technique once, with all choices that it may have."""
    kinds = techniques(request)
    default = getattr(request.model_fields[key].get_default(call_default_factory=True), key)
    words = ARGUMENTS.get(f"{verb}.{key}", ARGUMENTS.get(key, ""))
    choice = {"enum": list(kinds), "default": default, "description": words}
    found: dict[str, tuple[list[str], Json]] = {}
    for kind, params in kinds.items():
        for name, schema in _properties(params).items():
            if name == key or name in request.model_fields or "const" in schema:
                continue
            holders, known = found.get(name, ([], schema))
            same = {part: value for part, value in known.items() if schema.get(part) == value or part == "description"}
            if "enum" in schema:
                same["enum"] = [*known["enum"], *(value for value in schema["enum"] if value not in known["enum"])]
            found[name] = ([*holders, kind], same)
    return {key: choice} | {
        name: schema | ({"holders": f"({', '.join(holders)})"} if len(holders) < len(kinds) else {})
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


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
