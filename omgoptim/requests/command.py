"""Shell command that repeats a request."""

from __future__ import annotations

import ast
import json
import re
import shlex
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.requests.base import Params, Request

POSITIONAL = ("model", "a", "b")
"""Positional arguments of a command."""

_CALL = re.compile(r"`omgoptim\.(?P<verb>[a-z]+)\((?P<arguments>[^`]*)\)`")
_ARGUMENT = re.compile(r"`(?P<name>[a-z][a-z_]*)=(?P<value>[^`]+)`")


def command_of(verb: str, request: Request) -> str:
    """Return the command line of a request, without arguments at their default.

    `omgoptim quantize net.py:build --data net.py:load --scheme static --calibration-samples 64`
    """
    words = ["omgoptim", verb]
    words += [str(getattr(request, name)) for name in POSITIONAL if name in type(request).model_fields]
    for name, field in type(request).model_fields.items():
        value = getattr(request, name)
        if name not in POSITIONAL and value != field.get_default(call_default_factory=True):
            words += _technique(name, value) if isinstance(value, Params) else _option(name, value)
    return shlex.join(words)


def technique_arguments(request: Request) -> dict[str, Any]:
    """Return the technique and its parameters as flat arguments, without defaults."""
    given: dict[str, Any] = {}
    for key, field in type(request).model_fields.items():
        params = getattr(request, key)
        if isinstance(params, Params) and params != field.get_default():
            own = params.model_dump(exclude_defaults=True, exclude={"source"} if params.by_source else None)
            given |= own | {key: params.bare(key)}
    return given


def arguments_of(request: Request) -> dict[str, Any]:
    """Return the flat arguments of a request as a tool takes them, without defaults."""
    technique = technique_arguments(request)
    given = request.model_dump(mode="json", exclude_defaults=True)
    plain = {name: value for name, value in given.items() if not isinstance(getattr(request, name), Params)}
    return plain | technique


def _technique(key: str, params: Params) -> list[str]:
    """Yield the technique's name, then its own parameters."""
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


def in_shell(text: str) -> str:
    """Return the text of an error with its arguments (`omgoptim.errors.argument`) as options of a command.

    `` give `data='file.py:load'` `` becomes `give --data file.py:load`, and a call (`omgoptim.errors.call`) a command.
    """
    text = _CALL.sub(lambda found: _as_command(found["verb"], found["arguments"]), text)
    return _ARGUMENT.sub(lambda found: _as_option(found["name"], found["value"]), text)


def _as_option(name: str, text: str) -> str:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # it names an object of its Python process
        return f"{name}={text}"
    return shlex.quote(str(value)) if name in POSITIONAL else shlex.join(_option(name, value))


def _as_command(verb: str, arguments: str) -> str:
    """Return the command of a call; the call itself where it names an object of its Python process."""
    from omgoptim.requests import parse

    try:
        made = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(made, ast.Call)  # what is written above
        given = {str(one.arg): ast.literal_eval(one.value) for one in made.keywords}
        return command_of(verb, parse(verb, given))
    except (ValueError, SyntaxError, OmgoptimError):
        return f"omgoptim.{verb}({arguments})"
