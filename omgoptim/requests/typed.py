"""Generator of the typed arguments of each verb, for type checkers and editors.

`make arguments` writes `omgoptim/requests/arguments.py`; a test reports when it is out of date.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic.fields import FieldInfo

from omgoptim.requests import REGISTRY, VERBS, technique_field, techniques
from omgoptim.requests.base import ModelRequest, Request
from omgoptim.requests.training import RecoveryRequest, TrainingRequest

OBJECTS = ("data", "metric", "loss", "space")
"""Arguments of a verb that may be objects of the caller's process."""

SHARED: tuple[type[Request], ...] = (RecoveryRequest, TrainingRequest, ModelRequest)
"""Requests whose arguments several verbs share: a class of their own each."""

HEAD = '''"""The arguments of each verb, for type checkers and editors.

Written by `make arguments`: edit the requests, not this.
"""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict
'''


def parameters_of(verb: str) -> frozenset[str]:
    """Return the arguments that a verb's function in `omgoptim.api` takes as parameters of its own.

    These are what it needs, what may be an object, and its technique.

    >>> sorted(parameters_of("compare"))
    ['a', 'b']
    >>> sorted(parameters_of("prune"))
    ['data', 'loss', 'method', 'metric', 'model']
    """
    request, key = VERBS[verb], technique_field(VERBS[verb])
    required = {name for name, field in request.model_fields.items() if field.is_required()}
    known = set(request.model_fields).union(*(params.model_fields for params in techniques(request).values()))
    objects = {name for name in OBJECTS if name in known and REGISTRY[verb].on_model}
    return frozenset(required | objects | ({key} if key else set()))


def arguments_of(verb: str) -> dict[str, tuple[list[Any], Any, str]]:
    """Return the further arguments of a verb, techniques included, by name: types, default and description."""
    request, key = VERBS[verb], technique_field(VERBS[verb])
    found: dict[str, tuple[list[Any], Any, str]] = {}
    for name, field in request.model_fields.items():
        types_: list[Any] = [field.annotation]
        default = field.get_default(call_default_factory=True)
        if name == key:
            names: Any = tuple(techniques(request))
            types_, default = [Literal[names], dict[str, Any]], default.bare(key)
        found[name] = (types_, default, _words(field))
    holders: dict[str, list[tuple[str, FieldInfo]]] = {}
    for kind, params in techniques(request).items():
        for name, field in params.model_fields.items():
            if name not in (*found, "source"):
                holders.setdefault(name, []).append((kind, field))
    for name, held in holders.items():
        first = held[0][1]
        kinds = "" if len(held) == len(techniques(request)) else f"(of {key} {', '.join(kind for kind, _ in held)}) "
        words = next(filter(None, (_words(field) for _, field in held)), "")
        found[name] = (
            [field.annotation for _, field in held],
            first.get_default(call_default_factory=True),
            f"{kinds}{words}".strip(),
        )
    return {name: one for name, one in found.items() if name not in parameters_of(verb)}


def _words(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def signature_of(verb: str, function: Any) -> inspect.Signature:
    """Return the signature of a verb's function, with every argument by name in place of `**arguments`."""
    own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_text(types_))
        for name, (types_, default, _) in arguments_of(verb).items()
    ]
    return inspect.Signature([*own, *more], return_annotation="EfficiencyReport")


def help_of(verb: str) -> str:
    """Return one line for each further argument of a verb: its name, description and default."""
    lines = []
    for name, (_, default, words) in arguments_of(verb).items():
        ending = "" if default in (None, [], {}, False, "") else f" Default: {default}."
        lines.append(f"    {name}: {words}{ending}")
    return "\n".join(lines)


def source() -> str:
    """Return the source of the module `omgoptim.requests.arguments`."""
    return "\n\n".join([HEAD + "\n" + _names(), *(_class(name, base, fields) for name, base, fields in _classes())])


def _names() -> str:
    """Return type aliases of each verb's technique names: `QuantizeScheme = Literal["auto", …]`."""
    lines = []
    for verb, request in VERBS.items():
        if key := technique_field(request):
            names: Any = Literal[tuple(techniques(request))]
            lines.append(f"{verb.capitalize()}{key.capitalize()} = {_name(names)}\n")
    return "".join(lines)


def _classes() -> Iterator[tuple[str, str, dict[str, list[Any]]]]:
    yield "ModelArguments", "TypedDict", _shared(ModelRequest, None)
    yield "TrainingArguments", "ModelArguments", _shared(TrainingRequest, ModelRequest)
    yield "RecoveryArguments", "TrainingArguments", _shared(RecoveryRequest, TrainingRequest)
    for verb, request in VERBS.items():
        base = next((one for one in SHARED if issubclass(request, one)), None)
        inherited = base.model_fields if base else {}
        fields = {name: one[0] for name, one in arguments_of(verb).items() if name not in inherited}
        name = base.__name__.replace("Request", "Arguments") if base else "TypedDict"
        yield f"{verb.capitalize()}Arguments", name, fields


def _shared(request: type[Request], above: type[Request] | None) -> dict[str, list[Any]]:
    named = {*(above.model_fields if above else ()), "model", "data", "metric", "loss"}
    return {name: [field.annotation] for name, field in request.model_fields.items() if name not in named}


def _class(name: str, base: str, fields: dict[str, list[Any]]) -> str:
    lines = [f"    {field}: {_text(types_)}" for field, types_ in fields.items()] or ["    pass"]
    return "\n".join([f"class {name}({base}, total=False):", *lines, ""])


def _text(types_: list[Any]) -> str:
    members = [member for one in types_ for member in _members(one)]
    return " | ".join(dict.fromkeys(_name(member) for member in members))


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _name(annotation: Any) -> str:
    if annotation is type(None):
        return "None"
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        quoted = (f'"{value}"' if isinstance(value, str) else repr(value) for value in arguments)
        return f"Literal[{', '.join(quoted)}]"
    if arguments:
        return f"{annotation.__origin__.__name__}[{', '.join(_name(one) for one in arguments)}]"
    return "Any" if annotation is Any else str(annotation.__name__)


if __name__ == "__main__":
    sys.stdout.write(source())
