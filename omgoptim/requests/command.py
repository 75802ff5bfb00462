"""A request as the shell command that repeats it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from omgoptim.requests.base import Params, Request

POSITIONAL = ("model", "a", "b")
"""Arguments that a command takes by place."""


def command_of(verb: str, request: Request) -> str:
    """The command line of a request, without what is left at its default.

    `omgoptim quantize net.py:build --data net.py:load --scheme static --calibration-samples 64`
    """
    words = ["omgoptim", verb]
    words += [str(getattr(request, name)) for name in POSITIONAL if name in type(request).model_fields]
    for name, field in type(request).model_fields.items():
        value = getattr(request, name)
        if name not in POSITIONAL and value != field.get_default(call_default_factory=True):
            words += _technique(name, value) if isinstance(value, Params) else _option(name, value)
    return shlex.join(words)


def _technique(key: str, params: Params) -> list[str]:
    """The technique's name, then its own parameters."""
    words = _option(key, params.bare(key))
    for name, field in type(params).model_fields.items():
        value = getattr(params, name)
        if (
            name != key
            and not (params.by_source and name == "source")
            and value != field.get_default(call_default_factory=True)
        ):
            words += _option(name, value)
    return words


def _option(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list):
        return [word for item in value for word in (flag, str(item))]
    if isinstance(value, float):
        return [flag, f"{value:.12g}"]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
