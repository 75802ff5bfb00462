"""A verb is declared once, in the registry; what belongs to it has its name."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import omgoptim
from omgoptim.errors import RequestError
from omgoptim.operations import operation_of
from omgoptim.requests import QUERIES, REGISTRY, TITLES, VERBS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", REGISTRY)
def test_the_operation_of_a_verb_takes_its_request(verb: str) -> None:
    module, _, name = REGISTRY[verb].operation.partition(":")
    operation = operation_of(verb)
    assert operation is getattr(importlib.import_module(module), name)
    parameters = inspect.signature(operation, eval_str=False).parameters
    assert next(iter(parameters.values())).annotation == REGISTRY[verb].request.__name__
    assert ("live" in parameters) is REGISTRY[verb].on_model


@pytest.mark.parametrize("verb", REGISTRY)
def test_a_verb_has_its_python_function_its_command_page_and_its_test(verb: str) -> None:
    assert verb in omgoptim.__all__, f"name omgoptim.{verb} in omgoptim/__init__.py"
    assert callable(getattr(omgoptim, verb)), f"write the function {verb} in omgoptim/api/"
    for path in (f"commands/{verb}.md", f"tests/operations/test_{verb}.py"):
        assert (ROOT / path).is_file(), f"write {path}"


def test_every_verb_has_a_title_of_its_own() -> None:
    assert list(TITLES) == [*VERBS, *QUERIES]
    assert len(set(TITLES.values())) == len(TITLES)


def test_a_verb_that_starts_no_run_is_refused_with_the_nearest_that_does() -> None:
    with pytest.raises(RequestError) as refused:
        operation_of("prone")
    assert "prune" in refused.value.why
