"""Every params class in a verb's union has one technique, every technique a params class, and both are explained."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import omgoptim
from omgoptim.requests import VERBS, Params, distill, quantize, techniques
from omgoptim.runtimes import ENGINES
from omgoptim.techniques import registry

CHOOSERS: set[type[Params]] = {quantize.Auto, distill.Auto, distill.Given}
"""Params that choose among techniques, or name a module, instead of being a technique."""

ASKABLE = {params for request in VERBS.values() for params in techniques(request).values()}
REGISTERED = registry.all_techniques()
SECTIONS = ("What it does:", "Use when:", "What you really get:", "Limits:", "Source:")


def by_name(params: type[Params]) -> str:
    return params.__name__


def test_what_can_be_asked_for_and_what_is_registered_are_the_same() -> None:
    assert set(REGISTERED) == ASKABLE - CHOOSERS


@pytest.mark.parametrize("params", sorted(ASKABLE, key=by_name), ids=by_name)
def test_a_params_class_explains_itself_and_has_working_defaults(params: type[Params]) -> None:
    assert (params.__doc__ or "").strip() not in {"", (Params.__doc__ or "").strip()}
    needed = {name: "x" for name, field in params.model_fields.items() if field.is_required()}
    assert set(needed) <= ({"source"} if params.by_source else set())
    assert params(**needed) == params.model_validate(params(**needed).model_dump())


@pytest.mark.parametrize("request_name", [name for name, request in VERBS.items() if techniques(request)])
def test_a_technique_is_found_by_the_name_its_params_class_gives_it(request_name: str) -> None:
    for name, params in techniques(VERBS[request_name]).items():
        if params not in CHOOSERS:
            assert registry.technique_of(params()).params is params, name


@pytest.mark.parametrize("params", sorted(REGISTERED, key=by_name), ids=by_name)
def test_a_technique_lives_in_one_file_that_explains_it(params: type[Params]) -> None:
    module = inspect.getmodule(REGISTERED[params].apply)
    assert module is not None
    text = inspect.getdoc(module) or ""
    assert [section for section in SECTIONS if section not in text] == []
    owners = {other for other, entry in REGISTERED.items() if inspect.getmodule(entry.apply) is module}
    assert owners == {params}


@pytest.mark.parametrize("params", sorted(REGISTERED, key=by_name), ids=by_name)
def test_a_technique_names_engines_that_exist_and_where_it_comes_from(params: type[Params]) -> None:
    entry = REGISTERED[params]
    assert entry.runtimes
    assert set(entry.runtimes) <= set(ENGINES)
    assert entry.source


def test_a_second_technique_for_the_same_params_is_refused() -> None:
    params, entry = next(iter(REGISTERED.items()))
    with pytest.raises(ValueError, match=f"{params.__name__} has a technique already"):
        registry.technique(params, runtimes=("onnxruntime",), needs_data=False, source="a test")(entry.apply)


def test_every_skip_gives_the_kind_of_its_reason() -> None:
    calls = [
        (path, node)
        for path in Path(omgoptim.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Skip"
    ]
    assert calls
    assert [(path.name, n.lineno) for path, n in calls if "kind" not in {word.arg for word in n.keywords}] == []
