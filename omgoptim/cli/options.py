"""The options of a verb, read off its request: a new field or technique needs no edit here.

Values stay text where a request reads text, and only what was given is passed on, so that `requests.parse` refuses in
the same words everywhere.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import typer
from pydantic.fields import FieldInfo

from omgoptim.errors import RequestError
from omgoptim.requests import GRANTS, ModelRequest, Params, Request, TrainingRequest, technique_field, techniques
from omgoptim.requests.limits import DEEPEST

Kind = Literal["text", "number", "flag", "list", "mapping"]

TRAINING, MODEL, MEASUREMENT = "Training", "Model and data", "Measurement"
PROJECT, OUTPUT = "Project and permissions", "Output"
SHARED_PANELS = (TRAINING, MODEL, MEASUREMENT, PROJECT, OUTPUT)
"""Panels of the help after those of the verb and its techniques, in this order."""

_PANELS = {
    **dict.fromkeys(("device", "target", "timing", "batch", "threads", "samples", "seed", "time_limit_s"), MEASUREMENT),
    **dict.fromkeys(("project", "python", *GRANTS), PROJECT),
    **dict.fromkeys(("output", "plan", "explain", "sensitivity"), OUTPUT),
}
"""Panel of an argument that several verbs have; the rest of `ModelRequest` is about the model and its data."""

_METAVARS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}
_LONGEST_METAVAR = 22
"""Choices that are longer stand in the help, where they can be broken between words."""


@dataclass(frozen=True, slots=True)
class ShellOption:
    """An argument of a verb as the shell sees it."""

    name: str
    kind: Kind
    positional: bool
    help: str
    metavar: str
    default: Any
    panel: str | None = None
    default_text: str = ""
    required: bool = True
    """False for a positional argument that also has a named option."""

    @property
    def turns_off(self) -> str | None:
        """The `no_` option of a flag that is not off by default; None for any other."""
        return f"no_{self.name}" if self.kind == "flag" and self.default is not False else None

    def parameters(self) -> list[inspect.Parameter]:
        """Return the parameters of a function that Typer reads: the option, and the one that turns it off.

        The second is hidden and shown in the first one's type column: a column of its own would crowd out the names.
        """
        off = self.turns_off
        if off is None:
            return [self._parameter()]
        hidden = typer.Option(None, "--" + off.replace("_", "-"), hidden=True)
        other = inspect.Parameter(off, inspect.Parameter.KEYWORD_ONLY, default=hidden, annotation=bool | None)
        return [self._parameter(), other]

    def _parameter(self) -> inspect.Parameter:
        shown = self.help.replace("[", "\\[")
        kinds: dict[Kind, Any] = {"flag": bool | None, "list": list[str] | None, "mapping": list[str] | None}
        annotation = kinds.get(self.kind, str if self.positional and self.required else str | None)
        default: Any
        if self.positional:
            default = typer.Argument(... if self.required else None, metavar=self.metavar, help=shown)
        else:
            flag = "--" + self.name.replace("_", "-")
            off = f"/--no-{flag[2:]}" if self.turns_off else ""
            metavar = off if self.kind == "flag" else self.metavar
            ending = f" Default: {self.default_text}." if self.default_text else ""
            default = typer.Option(None, flag, metavar=metavar, help=shown + ending, rich_help_panel=self.panel)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if self.positional else inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=default, annotation=annotation)

    def value(self, given: Any) -> Any:
        """Return a value as `requests.parse` takes it."""
        if self.kind == "list":
            return list(given)
        if self.kind == "mapping":
            return _mapping(self.name, given)
        return _number(given) if self.kind == "number" else given


def options_of(request: type[Request]) -> list[ShellOption]:
    """The options of a verb, panel by panel: what it needs by place, its own, its techniques', and the shared ones."""
    key = technique_field(request)
    own = [
        _technique_choice(name, request) if name == key else _option(name, [("", field)], _panel(name, request))
        for name, field in request.model_fields.items()
    ]
    named = [name for option in own for name in _with_aliases(option, request)]
    panels = [None, *_technique_panels(request), *SHARED_PANELS]
    return sorted(
        [*named, *_technique_options(request)], key=lambda option: (not option.positional, panels.index(option.panel))
    )


def given_arguments(request: type[Request], given: dict[str, Any]) -> dict[str, Any]:
    """Return the raw request: the given arguments only."""
    options = {option.name: option for option in options_of(request)}
    off = {option.turns_off: name for name, option in options.items() if option.turns_off}
    kept = {name: value for name, value in given.items() if value not in (None, [], ())}
    return {off.get(name, name): False if name in off else options[name].value(value) for name, value in kept.items()}


def _with_aliases(option: ShellOption, request: type[Request]) -> list[ShellOption]:
    """Return an argument and its aliases as options."""
    others = [other for other, name in request.aliases.items() if name == option.name]
    if not others:
        return [option]
    place = replace(option, required=False, metavar=others[0].upper())
    return [
        place,
        *(
            replace(option, name=other, positional=False, help=f"The same as {place.metavar}.", metavar="TEXT")
            for other in others
        ),
    ]


def _panel(name: str, request: type[Request]) -> str | None:
    """Return the panel of an argument that verbs share; None for the verb's own."""
    if name in _PANELS:
        return _PANELS[name]
    if issubclass(request, ModelRequest) and name in ModelRequest.model_fields:
        return MODEL
    return TRAINING if issubclass(request, TrainingRequest) and name in TrainingRequest.model_fields else None


def _technique_panels(request: type[Request]) -> list[str]:
    """Return the panels of a verb's techniques: what several of them have, then one for each."""
    key, kinds = technique_field(request), techniques(request)
    return [_technique_panel(key, kinds), *(_technique_panel(key, [kind]) for kind in kinds)] if kinds else []


def _technique_panel(key: str | None, kinds: Collection[str]) -> str:
    """Return the panel of a parameter that these techniques have."""
    return f"Common to several {key}s" if len(kinds) > 1 else f"{str(key).capitalize()} {next(iter(kinds))}"


def _option(name: str, held: list[tuple[str, FieldInfo]], panel: str | None, of_all: bool = True) -> ShellOption:
    """Return the option of one argument of the request, or of several techniques."""
    fields = [field for _, field in held]
    kind, metavar = _kind(fields)
    words = _description(held, of_all)
    if len(metavar) > _LONGEST_METAVAR:
        words, metavar = f"{words} One of: {metavar.replace('|', ', ')}.", "NAME"
    words += {"list": " Repeatable.", "mapping": " KEY=VALUE, repeatable."}.get(kind, "")
    defaults = [None if field.is_required() else field.get_default(call_default_factory=True) for field in fields]
    positional = fields[0].is_required()
    metavar = name.upper() if positional else metavar
    default = defaults[0] if all(default == defaults[0] for default in defaults) else None
    panel = None if positional else panel
    return ShellOption(name, kind, positional, words.strip(), metavar, default, panel, _default_text(held, defaults))


def _description(held: list[tuple[str, FieldInfo]], of_all: bool) -> str:
    """Return the description; with the techniques that have it, unless all or one do, which its panel then names."""
    holders: dict[str, list[str]] = {}
    for kind, field in held:
        holders.setdefault(" ".join((field.description or "").split()), []).append(kind)
    if (of_all or len(held) == 1) and len(holders) == 1:
        return next(iter(holders))
    return " ".join(f"({', '.join(kinds)}) {words}".strip() for words, kinds in holders.items())


def _default_text(held: list[tuple[str, FieldInfo]], defaults: list[Any]) -> str:
    """Return the default, and the techniques whose default is another; empty where the default says nothing."""
    if defaults[0] in (None, [], {}, False, ""):
        return ""
    first = "on" if defaults[0] is True else str(defaults[0])
    others = [f"{kind}: {default}" for (kind, _), default in zip(held, defaults, strict=True) if default != defaults[0]]
    return f"{first} ({', '.join(others)})" if others else first


def _technique_choice(name: str, request: type[Request]) -> ShellOption:
    kinds = {
        "SOURCE" if params.by_source else kind: _first_sentence(params) for kind, params in techniques(request).items()
    }
    each = " ".join(f"{kind}: {words}." for kind, words in kinds.items())
    default = getattr(request.model_fields[name].get_default(call_default_factory=True), name)
    metavar = "|".join(kinds)
    short = "NAME|SOURCE" if "SOURCE" in kinds else "NAME"
    metavar = metavar if len(metavar) <= _LONGEST_METAVAR else short
    return ShellOption(name, "text", False, each, metavar, default, None, default)


def _first_sentence(params: type[Params]) -> str:
    summary = " ".join((params.__doc__ or "").partition("\n\n")[0].split())
    return summary.split(". ")[0].strip(" .")


def _technique_options(request: type[Request]) -> Iterator[ShellOption]:
    """Yield each parameter of a technique once, with the techniques that have it if not all do."""
    key, kinds = technique_field(request), techniques(request)
    holders: dict[str, list[tuple[str, FieldInfo]]] = {}
    for kind, params in kinds.items():
        for name, field in params.model_fields.items():
            if name != key and name not in request.model_fields and not (params.by_source and name == "source"):
                holders.setdefault(name, []).append((kind, field))
    for name, held in holders.items():
        yield _option(name, held, _technique_panel(key, [kind for kind, _ in held]), of_all=len(held) == len(kinds))


def _kind(fields: list[FieldInfo]) -> tuple[Kind, str]:
    """Return the kind of option for a type, and its metavar: the choices of a Literal."""
    members = [member for field in fields for member in _members(field.annotation)]
    origins = {typing.get_origin(member) or member for member in members}
    if list in origins:
        return "list", "TEXT"
    if dict in origins:
        return "mapping", "KEY=VALUE"
    if origins == {bool}:
        return "flag", ""
    if Literal in origins:
        choices = list(dict.fromkeys(value for member in members for value in typing.get_args(member)))
        return ("text" if any(isinstance(value, str) for value in choices) else "number"), "|".join(map(str, choices))
    if str in origins:
        return "text", "TEXT"
    return "number", _METAVARS.get(next(iter(origins)), "VALUE")


def _members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, None left out."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for member in typing.get_args(annotation) if member is not type(None)]
    return [annotation]


def _number(text: str) -> Any:
    """Return the number in a text; any other text unchanged, for the request to refuse."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else text


def _mapping(name: str, given: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, a value read as JSON where it is JSON; or one JSON object."""
    if len(given) == 1 and given[0].lstrip().startswith("{"):
        try:
            return dict(json.loads(given[0]))
        except ValueError:
            pass
        except RecursionError:
            raise _too_deep(name) from None
    mapping: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            flag = "--" + name.replace("_", "-")
            raise RequestError(
                f"'{text[:80]}' is not KEY=VALUE", f"{flag} takes pairs", f"for instance {flag} width=64"
            )
        try:
            mapping[key] = json.loads(value)
        except ValueError:
            mapping[key] = value
        except RecursionError:
            raise _too_deep(name) from None
    return mapping


def _too_deep(name: str) -> RequestError:
    return RequestError(f"'{name}' is nested too deep", f"at most {DEEPEST} levels are read", "flatten it")
