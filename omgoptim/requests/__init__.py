"""Requests and their parser. No torch: the server imports them and must start fast.

`REGISTRY` declares the verbs, `VERBS` maps each to its request. All raw arguments (MCP, CLI, Python, request.json)
become requests by `parse`, so that every interface accepts the same arguments and reports the same errors.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from typing import Any, cast

from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from omgoptim.errors import OmgoptimError, RequestError, argument, did_you_mean
from omgoptim.requests.base import DTYPES, GRANTS, InputSpec, ModelRequest, Params, Request
from omgoptim.requests.distill import DistillRequest
from omgoptim.requests.factorize import FactorizeRequest
from omgoptim.requests.limits import refuse_unusable, shortened
from omgoptim.requests.measure import CompareRequest, ProfileRequest
from omgoptim.requests.optimize import OptimizeRequest, SearchRequest
from omgoptim.requests.prune import PruneRequest
from omgoptim.requests.quantize import QuantizeRequest
from omgoptim.requests.registry import QUERIES, REGISTRY, TITLES, VERBS, Verb, verb_of
from omgoptim.requests.runs import DoctorRequest, RunsRequest
from omgoptim.requests.training import RecoveryRequest, TrainingRequest
from omgoptim.text import clean

__all__ = [
    "DTYPES",
    "GRANTS",
    "QUERIES",
    "REGISTRY",
    "TITLES",
    "VERBS",
    "CompareRequest",
    "DistillRequest",
    "DoctorRequest",
    "FactorizeRequest",
    "InputSpec",
    "ModelRequest",
    "OptimizeRequest",
    "Params",
    "ProfileRequest",
    "PruneRequest",
    "QuantizeRequest",
    "RecoveryRequest",
    "Request",
    "RunsRequest",
    "SearchRequest",
    "TrainingRequest",
    "Verb",
    "parse",
    "refuse_unusable",
    "technique_field",
    "techniques",
    "unknown_argument",
    "verb_of",
]


def technique_field(request: type[Request]) -> str | None:
    """Return the name of the field with the technique's own parameters (`scheme` for quantize), or None."""
    return next((name for name, field in request.model_fields.items() if _union_members(field)), None)


def techniques(request: type[Request]) -> dict[str, type[Params]]:
    """Return the params classes of a verb's techniques by name, in the order of the union; empty if it has none."""
    key = technique_field(request)
    if key is None:
        return {}
    return {member.model_fields[key].default: member for member in _union_members(request.model_fields[key])}


def parse(verb: str, raw: dict[str, Any]) -> Request:
    """Parse raw arguments into a request.

    A technique's parameters may stand beside the common arguments (`scheme="static", calibration_samples=64`) or in
    an object of their own (`scheme={"scheme": "static", "calibration_samples": 64}`).

    Raises:
        RequestError: an unknown verb or argument (with the nearest known one), a missing argument, a broken bound.
    """
    known = VERBS | QUERIES
    if verb not in known:
        raise RequestError(f"unknown command '{verb[:80]}'", did_you_mean(verb, known))
    request = known[verb]
    refuse_unusable(raw)
    _refuse_unnamed_technique(verb, request, raw)
    arguments = _gather_technique_arguments(verb, request, _by_first_names(verb, request, dict(raw)))
    try:
        return request.model_validate(arguments)
    except OmgoptimError:
        raise
    except ValidationError as error:
        raise _rephrase(verb, error) from None


def _refuse_unnamed_technique(verb: str, request: type[Request], arguments: dict[str, Any]) -> None:
    """Refuse values that name no technique: a number, a list, null, an object without the name."""
    key = technique_field(request)
    if key is None or key not in arguments or isinstance(arguments[key], (str, Params)):
        return
    chosen, known = arguments[key], did_you_mean("", techniques(request))
    fix = f"give {key} by its name, or as an object such as {_example(request)}; or leave it out"
    if not isinstance(chosen, dict) or (key in chosen and not isinstance(chosen[key], str)):
        received = chosen[key] if isinstance(chosen, dict) else chosen
        raise RequestError(f"{shortened(received)} is not a {key} of {verb}", known, fix)
    if key not in chosen:
        names = ", ".join(map(str, chosen)) or "nothing"
        raise RequestError(f"the object for {key} of {verb} does not say which {key}", f"it has {names}. {known}", fix)


def _example(request: type[Request]) -> str:
    """Return a technique as an object: its name and one parameter."""
    key = technique_field(request)
    name, params = next(item for item in techniques(request).items() if len(item[1].model_fields) > 1)
    parameter = next(field for field in params.model_fields if field != key)
    return f'{{"{key}": "{name}", "{parameter}": …}}'


def _union_members(field: FieldInfo) -> list[type[Params]]:
    members = typing.get_args(field.annotation)
    return [m for m in members if isinstance(m, type) and issubclass(m, Params)] if field.discriminator else []


def _by_first_names(verb: str, request: type[Request], arguments: dict[str, Any]) -> dict[str, Any]:
    for other, name in request.aliases.items():
        if other not in arguments:
            continue
        if name in arguments:
            raise RequestError(f"{verb} was given '{name}' and '{other}'", "they are the same argument", "give one")
        arguments[name] = arguments.pop(other)
    return arguments


def _gather_technique_arguments(verb: str, request: type[Request], arguments: dict[str, Any]) -> dict[str, Any]:
    """Move a technique's parameters into the technique's object; refuse unknown names."""
    key = technique_field(request)
    loose = [name for name in arguments if name not in request.model_fields]
    if not loose:
        return arguments
    if key is None:
        raise unknown_argument(loose[0], verb, request.model_fields)
    chosen = arguments.get(key, request.model_fields[key].get_default().model_dump()[key])
    nested = dict(_expanded(request.model_fields[key], chosen))
    kinds = techniques(request)
    technique = kinds.get(str(nested.get(key)))
    if technique is None:
        return arguments | {key: chosen}  # the union's own error lists the known names
    for name in loose:
        if name not in technique.model_fields:
            holders = [other for other, kind in kinds.items() if name in kind.model_fields]
            if holders:
                raise RequestError(
                    f"{key} '{nested[key]}' has no parameter '{name}'",
                    f"'{name}' belongs to {key} {' and '.join(holders)}",
                    f"give {argument(key, holders[0])}, or leave '{name}' out",
                )
            raise unknown_argument(name, verb, {**request.model_fields, **technique.model_fields})
        nested[name] = arguments.pop(name)
    return arguments | {key: nested}


def _expanded(field: FieldInfo, chosen: Any) -> Any:
    """Return the params of a technique's bare name, by the field's own validator."""
    for expand in field.metadata:
        if isinstance(expand, BeforeValidator):
            chosen = cast(Callable[[Any], Any], expand.func)(chosen)
    return chosen


def unknown_argument(name: str, verb: str, known: Iterable[str]) -> RequestError:
    """Return the error for an argument that a verb does not have, with the nearest that it has."""
    return RequestError(
        f"{verb} has no argument '{clean(name, 80)}'", did_you_mean(name, known), "give it by its name, or leave it out"
    )


def _rephrase(verb: str, error: ValidationError) -> RequestError:
    """Return the first validation error as a RequestError, in words for users of a verb instead of pydantic's."""
    problem = error.errors(include_url=False)[0]
    known = VERBS | QUERIES
    where = [part for part in problem["loc"] if part not in techniques(known[verb])]
    name = ".".join(str(part) for part in where) or verb
    received = shortened(problem["input"])
    match problem["type"]:
        case "missing":
            others = [other for other, first in known[verb].aliases.items() if first == name]
            ways = " or ".join(f"{way}=…" for way in (name, *others))
            return RequestError(f"{verb} needs '{name}'", "it was not given", f"give {ways}")
        case "extra_forbidden":
            technique = techniques(known[verb]).get(str(problem["loc"][1])) if len(problem["loc"]) > 2 else None
            return unknown_argument(str(where[-1]), verb, dict((technique or known[verb]).model_fields))
        case "union_tag_invalid":
            key = str(where[-1])
            value = problem["ctx"]["tag"]
            what = f"'{clean(str(value), 80)}' is not a {key} of {verb}"
            return RequestError(what, did_you_mean(str(value), techniques(known[verb])))
        case "literal_error":
            choices = [part.strip("' ") for part in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
            fix = _who_takes(str(where[-1]), problem["input"], known[verb])
            given = str(problem["input"])
            return RequestError(f"'{clean(given, 80)}' is not a value of {name}", did_you_mean(given, choices), fix)
        case "value_error":
            return RequestError(problem["msg"].removeprefix("Value error, "))
    return RequestError(f"'{name}' of {verb} is not valid", f"{problem['msg']}; received {received}")


def _who_takes(name: str, value: Any, request: type[Request]) -> str:
    """Return the techniques that take a value which the chosen one does not; empty if none does."""
    fields = ((kind, params.model_fields.get(name)) for kind, params in techniques(request).items())
    takers = [kind for kind, field in fields if field is not None and value in typing.get_args(field.annotation)]
    return f"{technique_field(request)} {' or '.join(takers)} takes it" if takers else ""
