from __future__ import annotations

import pytest

from omgoptim.requests import parse
from omgoptim.requests.command import command_of


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
