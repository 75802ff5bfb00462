"""Tests of the arguments as type checkers, editors and `help()` see them: they follow from the requests."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import omgoptim
from omgoptim.requests import VERBS, arguments, techniques
from omgoptim.requests.typed import arguments_of, parameters_of, source


def test_the_arguments_of_type_checkers_are_those_of_the_requests() -> None:
    made = Path(arguments.__file__).read_text()
    assert made == source(), "run: make arguments"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_shows_every_argument_of_its_request_by_name(verb: str) -> None:
    function = getattr(omgoptim, verb)
    parameters = inspect.signature(function).parameters
    request = VERBS[verb]
    fields = {*request.model_fields, *(name for one in techniques(request).values() for name in one.model_fields)}
    named = {"teacher" if name == "model" and verb == "distill" else name for name in fields - {"source"}}
    assert set(parameters) == named | {"progress"}
    for name in arguments_of(verb):
        assert f"\n    {name}: " in function.__doc__
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters_of(verb).isdisjoint(arguments_of(verb))


def test_help_shows_the_default_of_an_argument_and_the_techniques_that_have_it() -> None:
    printed = omgoptim.quantize.__doc__ or ""
    assert "max_quality_drop: Quality guard: largest allowed drop of the metric" in printed
    assert "Default: 0.01." in printed
    assert "calibration_samples: (of scheme auto, static" in printed


def test_the_names_of_the_package_complete_before_anything_is_imported() -> None:
    assert {"quantize", "open_artifact"} <= set(dir(omgoptim))


@pytest.mark.slow
def test_a_type_checker_refuses_an_unknown_argument_and_a_wrong_type(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy")
    assert mypy
    script = tmp_path / "user.py"
    script.write_text(
        "import omgoptim\n"
        "omgoptim.quantize('net.py:build', scheme='static', max_quality_drop=0.1)\n"
        "omgoptim.quantize('net.py:build', max_qualty_drop=0.1)\n"
        "omgoptim.prune('net.py:build', pruning_ratio='half')\n"
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path), str(script)]
    printed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]).stdout
    assert [int(line.split(":")[1]) for line in printed.splitlines() if ": error:" in line] == [3, 4], printed
