from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import omgoptim
from omgoptim.errors import argument, call
from omgoptim.requests import VERBS, parse, techniques
from omgoptim.requests.command import command_of, in_shell

PACKAGE = Path(omgoptim.__file__).parent
SHELL = ("omgoptim", "uv pip", "shell")
"""Marks of a shell command in a text."""


@pytest.mark.parametrize(
    ("verb", "arguments", "command"),
    [
        ("profile", {"model": "net.py:build"}, "omgoptim profile net.py:build"),
        (
            "quantize",
            {"model": "m.onnx", "scheme": "static", "calibration_samples": 64, "max_quality_drop": 0.02},
            "omgoptim quantize m.onnx --scheme static --calibration-samples 64 --max-quality-drop 0.02",
        ),
        (
            "quantize",
            {"model": "m.py:f", "inputs": ["1x2", "a:int64:1x3"], "plan": True, "model_kwargs": {"n": 1}},
            "omgoptim quantize m.py:f --model-kwargs '{\"n\": 1}' --inputs 1x2 --inputs a:int64:1x3 --plan",
        ),
        ("compare", {"a": "run 1", "b": "x", "timing": "quick"}, "omgoptim compare 'run 1' x --timing quick"),
    ],
)
def test_a_command_holds_what_was_not_left_at_its_default(
    verb: str, arguments: dict[str, object], command: str
) -> None:
    assert command_of(verb, parse(verb, arguments)) == command


def test_an_argument_in_an_error_is_named_as_in_python_and_shown_as_an_option_in_a_shell() -> None:
    fix = f"give {argument('max_quality_drop', 0.1)}, or {argument('inputs', ['ids:int64:1x8'])}; not `a` word = `b`"
    assert fix.startswith("give `max_quality_drop=0.1`, or ")
    assert in_shell(fix) == "give --max-quality-drop 0.1, or --inputs ids:int64:1x8; not `a` word = `b`"


def test_what_a_command_takes_by_place_has_no_option() -> None:
    fix = f"{argument('model', 'net.py:Net')} {argument('model_kwargs', {'width': 64})}"
    assert in_shell(fix) == "net.py:Net --model-kwargs '{\"width\": 64}'"


def test_a_call_in_an_error_is_python_and_shown_as_a_command_in_a_shell() -> None:
    made = call("quantize", {"model": "net.py:build", "scheme": "static", "targets": ["a*"], "data": "d.py:load"})
    assert made.startswith("`omgoptim.quantize(model='net.py:build', scheme='static'")
    command = "omgoptim quantize net.py:build --data d.py:load --scheme static --targets 'a*'"
    assert in_shell(f"do this: {made}") == f"do this: {command}"
    assert in_shell("`omgoptim.quantize(model, data=load)`") == "omgoptim.quantize(model, data=load)"


def test_no_error_of_the_package_names_an_option_of_the_shell() -> None:
    known = {name for verb in VERBS.values() for name in verb.model_fields}
    known |= {name for verb in VERBS.values() for one in techniques(verb).values() for name in one.model_fields}
    found = []
    for module in sorted(PACKAGE.rglob("*.py")):
        if module.relative_to(PACKAGE).parts[0] in ("cli", "render", "server"):
            continue
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            flags = (flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
            found += [
                (module.name, flag) for flag in flags if flag in known and not any(word in text for word in SHELL)
            ]
    assert found == []
