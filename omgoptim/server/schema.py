"""The JSON schemas of the tools' arguments, made small, because a tool list is paid for in every conversation.

Titles, nulls, bounds (`requests.parse` checks them) and empty defaults are left out. A technique's parameters stand
beside the common arguments, each once, with the techniques that have it. An argument is described where it first
appears, by the short text of `words.py`, and is only named by the tools after that; its first choice is the default.
What every verb shares and is rarely given stands in one object, `options`, and is told in the server's instructions.
"""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel

from omgoptim.requests import GRANTS, VERBS, ModelRequest, RecoveryRequest, Request, technique_field, techniques
from omgoptim.server.words import ARGUMENTS

Json = dict[str, Any]

OF_OUTPUTS = ("target_output", "ignore_outputs")
"""Only the instructions name these."""

MEASURING = (
    *("model_kwargs", "timing", "device", "batch", "threads", "samples", "seed", "time_limit_s", "python"),
    *OF_OUTPUTS,
)
TRAINING = (
    *("learning_rate", "optimizer", "lr_schedule", "warmup", "weight_decay", "train_batch", "accumulate", "clip_norm"),
    *("mixed_precision", "patience", "loss", "lora_rank", "lora_alpha", "temperature", "alpha"),
)
RARE = (
    *("granularity", "symmetric", "algorithm", "range_method", "equalize", "bias_correction", "rounding"),
    *("smooth_quant", "group_size", "guard_time_s", "calibration_samples", "prefer"),
    *("score", "pattern", "reconstruct", "ranking", "round_to", "max_layer_ratio", "prune_heads", "layer_ratios"),
    *("scope", "importance", "convolution", "per", "energy", "rank", "weights"),
    *("candidates", "initialize", "output_loss", "features"),
    *("feature_weight", "feature_layers", "student_checkpoint", "student_kwargs", "expansion", "trial_epochs", "depth"),
)
OPTIONS = (*MEASURING, *TRAINING, *RARE)
"""What the tools take in the object `options`; beside the other arguments it is as welcome."""

SHELL_ONLY = GRANTS
"""What an agent may not give itself: the user sets OMGOPTIM_ALLOW_PATH and OMGOPTIM_ALLOW_MODULE for the server."""

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
    if verb not in VERBS:
        return []
    request = VERBS[verb]
    known = set(request.model_fields).union(*(params.model_fields for params in techniques(request).values()))
    return [name for name in OPTIONS if name in known]


def told_options() -> str:
    """The arguments that stand in `options`: those of measuring one line each, those of training by their names."""
    shared = []
    for name in MEASURING:
        field = ModelRequest.model_fields[name]
        default = "" if field.default in (None, {}, []) else f"={field.default}"
        shared.append(f"- {name}{default}: {_one_line(field.description)}")
    training = []
    for name in TRAINING:
        choices = typing.get_args(RecoveryRequest.model_fields[name].annotation)
        told = f" ({'|'.join(choices)})" if choices and isinstance(choices[0], str) else ""
        training.append(f"{name}{told}")
    return "\n".join([*shared, f"- training: {', '.join(training)}."])


def _options(verb: str, told: set[str]) -> Json:
    """The object of rarely needed arguments: names that the instructions don't tell, one of those of training."""
    new = [name for name in options_of(verb) if name not in told]
    if not new:
        return {"type": "object"}
    training = [name for name in new if name in TRAINING and "options" in told]
    listed = [name for name in new if name not in (*training, *OF_OUTPUTS)]
    words = f"Training parameters such as {training[0]}. " if training else ""
    return {"type": "object", "description": words + (f"Rarely needed: {', '.join(listed)}." if listed else "")}


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
    return {"type": schema["type"]} if schema.get("type") in ("array", "object") else {}


def _properties(model: type[BaseModel]) -> dict[str, Json]:
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    return {name: _small(_resolved(value, definitions)) for name, value in schema["properties"].items()}


def _technique_properties(verb: str, key: str, request: type[Request]) -> dict[str, Json]:
    """The choice of a technique, and every parameter of every technique once, with all choices that it may have.

    Which techniques have a parameter is told where fewer than half of them do.
    """
    kinds = techniques(request)
    default = getattr(request.model_fields[key].get_default(call_default_factory=True), key)
    words = ARGUMENTS.get(f"{verb}.{key}", ARGUMENTS.get(key, ""))
    open_to_sources = any(params.by_source for params in kinds.values())
    named: Json = {"type": "string"} if open_to_sources else {"enum": list(kinds)}
    choice = named | ({} if named.get("enum", [None])[0] == default else {"default": default}) | {"description": words}
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
