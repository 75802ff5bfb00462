"""Validators of values in an exported program's JSON, and their combinators.

A validator takes a value and its location, and returns a checked copy or raises `RejectedProgram`.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

from omgoptim.models._pt2.operators import check_operator
from omgoptim.models._pt2.symbols import RejectedProgram, check_expression

Validator = Callable[[Any, str], Any]
"""Takes a value and its location; returns a checked copy or raises `RejectedProgram`."""

MAX_LIST = 10_000_000
"""Limit of a list's length, against memory exhaustion."""
MAX_TEXT = 10_000
"""Limit of a text's length, in characters."""
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""ASCII identifiers of Python."""
PATH = re.compile(r"[\w\-/ :+@,]+(\.[\w\-/ :+@,]+)*")
"""A dotted module path. Quotes, brackets and backslashes are out: the path becomes Python text."""


def object_of(**fields: Validator) -> Validator:
    """Validate an object of these fields; any may be absent, and others must be empty."""

    def check(value: Any, where: str) -> dict[str, Any]:
        for name, content in mapping(value, where).items():
            if name not in fields and content not in (None, False, 0, "", [], {}):
                raise RejectedProgram(where, f"it has an unknown field {name[:60]!r}")
        return {name: check(value[name], f"{where}.{name}") for name, check in fields.items() if name in value}

    return check


def one_of(**kinds: Validator) -> Validator:
    """Validate an object with exactly one of these fields."""

    def check(value: Any, where: str) -> dict[str, Any]:
        names = list(mapping(value, where))
        if len(names) != 1 or names[0] not in kinds:
            raise RejectedProgram(where, f"its kind is unknown: {', '.join(names)[:80]!r}")
        return {names[0]: kinds[names[0]](value[names[0]], f"{where}.{names[0]}")}

    return check


def list_of(item: Validator) -> Validator:
    """Validate a list."""

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > MAX_LIST:
            raise RejectedProgram(where, "it is not a list")
        return [item(content, f"{where}[{index}]") for index, content in enumerate(value)]

    return check


def mapping_of(key: Validator, item: Validator) -> Validator:
    """Validate an object whose keys are data."""

    def check(value: Any, where: str) -> dict[str, Any]:
        return {
            key(name, where): item(content, f"{where}[{name[:60]!r}]")
            for name, content in mapping(value, where).items()
        }

    return check


def optional(item: Validator) -> Validator:
    """Validate a value or null."""
    return lambda value, where: None if value is None else item(value, where)


def replaced_by(replacement: Any) -> Validator:
    """Ignore the value and use `replacement` instead."""
    return lambda _value, _where: replacement


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RejectedProgram(where, "it is not an object")
    return value


def integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**64:
        raise RejectedProgram(where, "it is not a 64-bit integer")
    return value


def number(value: Any, where: str) -> float | str:
    if value in ("Infinity", "-Infinity", "NaN"):
        return str(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1.8e308:
        raise RejectedProgram(where, "it is not a number")
    return value


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise RejectedProgram(where, "it is neither true nor false")
    return value


def text(value: Any, where: str) -> str:
    """Validate a line of printable text without double quotes or backslashes: engines write it into generated code."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable() or set(value) & set('"\\'):
        raise RejectedProgram(where, "it is not a plain line of text")
    return value


def cleaned(value: Any, where: str) -> str:
    """Convert a message for people to a plain line of text."""
    if not isinstance(value, str):
        raise RejectedProgram(where, "it is not text")
    shown = value[: 10 * MAX_TEXT].replace('"', "'").replace("\\", "/")
    return "".join(c if c.isprintable() else " " for c in shown)


def name(value: Any, where: str) -> str:
    """Validate an identifier: it becomes the name of a variable in generated Python."""
    if not isinstance(value, str) or len(value) > 1000 or not IDENTIFIER.fullmatch(value):
        raise RejectedProgram(where, f"{str(value)[:80]!r} is not a plain identifier")
    if keyword.iskeyword(value) or (value.startswith("__") and value.endswith("__")):
        raise RejectedProgram(where, f"{value[:80]!r} is reserved in Python")
    return value


def unnamed_or(check: Validator) -> Validator:
    return lambda value, where: value if value == "" else check(value, where)


def path(value: Any, where: str) -> str:
    """Validate the dotted path of a parameter, buffer, constant or submodule."""
    if not isinstance(value, str) or len(value) > 2000 or not PATH.fullmatch(value):
        raise RejectedProgram(where, f"{str(value)[:80]!r} is not a module path")
    if any(part.startswith("__") for part in value.split(".")):
        raise RejectedProgram(where, f"{value[:80]!r} names an internal attribute of Python")
    return value


def expression(value: Any, where: str) -> str:
    return check_expression(value, where)


def operator(value: Any, where: str) -> str:
    return check_operator(value, where)


def symbol(value: Any, where: str) -> str:
    """Validate the name of a dimension. Its digits count torch's symbols, one loop each, so there are few."""
    if not isinstance(value, str) or len(value) > 200:
        raise RejectedProgram(where, "it is not a symbol")
    if re.fullmatch(r"[A-Za-z]{1,8}\d{0,6}", value):
        return value
    return check_expression(value, where)
