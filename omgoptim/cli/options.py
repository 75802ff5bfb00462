"""The options of a verb, read off its request: a new field or technique needs no edit here.

Values stay text where a request reads text, and only what was given is passed on, so that `requests.parse` refuses in
the same words as for every other face.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import typer
from pydantic.fields import FieldInfo

from omgoptim.errors import RequestError
from omgoptim.requests import Request, technique_field, techniques

Kind = Literal["text", "number", "flag", "list", "mapping"]

_METAVARS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}


@dataclass(frozen=True, slots=True)
class Option:
    """One argument of a verb as the shell sees it."""

    name: str
    kind: Kind
    positional: bool
    help: str
    metavar: str
    default: Any
    panel: str | None = None

    def parameter(self) -> inspect.Parameter:
        """The parameter of a function that Typer reads."""
        shown = self.help.replace("[", "\\[")
        kinds: dict[Kind, Any] = {"flag": bool | None, "list": list[str] | None, "mapping": list[str] | None}
        annotation = kinds.get(self.kind, str if self.positional else str | None)
        default: Any
        if self.positional:
            default = typer.Argument(..., metavar=self.metavar, help=shown)
        else:
            flag = "--" + self.name.replace("_", "-")
            flags = f"{flag}/--no-{flag[2:]}" if self.kind == "flag" and self.default is True else flag
            metavar = None if self.kind == "flag" else self.metavar
            told = f" Default: {self.default}." if self.default not in (None, [], {}, False, "") else ""
            default = typer.Option(None, flags, metavar=metavar, help=shown + told, rich_help_panel=self.panel)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if self.positional else inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=default, annotation=annotation)

    def value(self, given: Any) -> Any:
        """What was given, as `requests.parse` takes it."""
        if self.kind == "list":
            return list(given)
        if self.kind == "mapping":
            return _mapping(self.name, given)
        return _number(given) if self.kind == "number" else given


def options_of(request: type[Request]) -> list[Option]:
    """The options of a verb: required arguments by place, then its own, then those of its techniques."""
    key = technique_field(request)
    options = []
    for name, field in request.model_fields.items():
        if name == key:
            options.append(_technique_choice(name, request))
        else:
            options.append(_option(name, field, positional=field.is_required()))
    return sorted([*options, *_technique_options(request)], key=lambda option: not option.positional)


def given_arguments(request: type[Request], given: dict[str, Any]) -> dict[str, Any]:
    """The raw request: only what was given."""
    told = {option.name: option for option in options_of(request)}
    return {name: told[name].value(value) for name, value in given.items() if value not in (None, [], ())}


def _option(name: str, field: FieldInfo, positional: bool = False, panel: str | None = None, of: str = "") -> Option:
    kind, metavar = _kind(field.annotation)
    about = " ".join((field.description or "").split())
    repeatable = {"list": " Repeatable.", "mapping": " KEY=VALUE, repeatable."}.get(kind, "")
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    metavar = name.upper() if positional else metavar
    return Option(name, kind, positional, f"{of}{about}{repeatable}".strip(), metavar, default, panel)


def _technique_choice(name: str, request: type[Request]) -> Option:
    kinds = techniques(request)
    each = "; ".join(f"{kind}: {(params.__doc__ or '').split('. ')[0].strip(' .')}" for kind, params in kinds.items())
    default = request.model_fields[name].get_default(call_default_factory=True)
    return Option(name, "text", False, f"{each}.", "|".join(kinds), getattr(default, name))


def _technique_options(request: type[Request]) -> Iterator[Option]:
    """Each parameter of a technique once, with the techniques that have it."""
    key = technique_field(request)
    holders: dict[str, list[tuple[str, FieldInfo]]] = {}
    for kind, params in techniques(request).items():
        for name, field in params.model_fields.items():
            if name != key and name not in request.model_fields:
                holders.setdefault(name, []).append((kind, field))
    for name, held in holders.items():
        of = f"({', '.join(kind for kind, _ in held)}) "
        option = _option(name, held[0][1], panel=f"Parameters of a {key}", of=of)
        defaults = [field.get_default(call_default_factory=True) for _, field in held]
        same = all(default == defaults[0] for default in defaults)
        yield (
            option if same else Option(option.name, option.kind, False, option.help, option.metavar, None, option.panel)
        )


def _kind(annotation: Any) -> tuple[Kind, str]:
    """How values of a type are given in a shell, and the word that stands for one."""
    members = _members(annotation)
    origins = {typing.get_origin(member) or member for member in members}
    if list in origins:
        return "list", "TEXT"
    if dict in origins:
        return "mapping", "KEY=VALUE"
    if origins == {bool}:
        return "flag", ""
    if Literal in origins:
        choices = [value for member in members for value in typing.get_args(member)]
        return ("text" if any(isinstance(value, str) for value in choices) else "number"), "|".join(map(str, choices))
    if str in origins:
        return "text", "TEXT"
    return "number", _METAVARS.get(next(iter(origins)), "VALUE")


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, None left out."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for member in typing.get_args(annotation) if member is not type(None)]
    return [annotation]


def _number(text: str) -> Any:
    """A number where the text is one; anything else is left for the request to refuse."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else text


def _mapping(name: str, given: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, a value read as JSON where it is JSON; or one JSON object."""
    if len(given) == 1 and given[0].lstrip().startswith("{"):
        try:
            return dict(json.loads(given[0]))
        except ValueError:
            pass
    mapping: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"'{text}' is no KEY=VALUE", f"{flag} takes pairs", f"for instance {flag} width=64")
        try:
            mapping[key] = json.loads(value)
        except ValueError:
            mapping[key] = value
    return mapping
