from __future__ import annotations

import subprocess
import sys

import pytest

from omgoptim.jobs.locks import device_of
from omgoptim.requests import parse

HOLD = """
import sys
from omgoptim.jobs.locks import device_lock
from filelock import Timeout
try:
    with device_lock(sys.argv[1]).acquire(timeout=0):
        print("held", flush=True)
        sys.stdin.read()
except Timeout:
    print("taken", flush=True)
"""


def hold(device: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_one_process_holds_a_device_and_its_death_frees_it() -> None:
    with hold("cpu") as first, hold("cuda") as other:
        assert first.stdout is not None
        assert other.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert other.stdout.readline() == "held\n"
        with hold("cpu") as second:
            assert second.communicate()[0] == "taken\n"
        first.kill()
        first.wait()
        with hold("cpu") as third:
            assert third.communicate()[0] == "held\n"
        other.communicate()


@pytest.mark.parametrize(
    ("verb", "arguments", "device"),
    [
        ("profile", {"model": "m.onnx"}, "cpu"),
        ("profile", {"model": "m.onnx", "device": "cuda"}, "cuda"),
        ("compare", {"a": "x", "b": "y"}, "cpu"),
        ("quantize", {"model": "m.onnx"}, "cpu"),
        ("quantize", {"model": "m.onnx", "plan": True}, None),
    ],
)
def test_what_measures_takes_a_device_and_a_plan_takes_none(
    verb: str, arguments: dict[str, object], device: str | None
) -> None:
    assert device_of(parse(verb, arguments)) == device
