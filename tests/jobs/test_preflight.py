from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import runs_root
from omgoptim.jobs.preflight import check_references
from omgoptim.jobs.submit import submit
from omgoptim.requests import parse

NET = """
from torch import nn
if True:
    late = nn.Linear
class Net(nn.Module): ...
def build(): ...
def load(split): ...
def _private(): ...
"""


@pytest.fixture
def files(project: Path) -> Path:
    (project / "net.py").write_text(NET)
    (project / "dynamic.py").write_text("globals()['build'] = lambda: None\n")
    (project / "broken.py").write_text("def build(:\n")
    (project / "weights.txt").write_text("")
    (project / "data.npz").write_bytes(b"")
    (project / "out").mkdir()
    (runs_root(project) / "quantize-20260101-0000-aaaa").mkdir(parents=True)
    return project


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("profile", {"model": "absent.py:build"}, "model 'absent.py' does not exist"),
        ("profile", {"model": "net.py:biuld"}, "net.py has no 'biuld'"),
        ("profile", {"model": "net.py"}, "model 'net.py' is a file"),
        ("profile", {"model": "absent.onnx"}, "model 'absent.onnx' does not exist"),
        ("profile", {"model": "absent.pt2"}, "model 'absent.pt2' does not exist"),
        ("profile", {"model": "../net.py:build"}, "lies outside the project"),
        ("profile", {"model": "quantize-20260101-0000-aaab"}, "is not a model"),
        ("profile", {"model": "net.py:build", "data": "net.py:laod"}, "net.py has no 'laod'"),
        ("profile", {"model": "net.py:build", "data": "absent.npz"}, "data 'absent.npz' does not exist"),
        ("profile", {"model": "net.py:build", "checkpoint": "absent.pt"}, "checkpoint 'absent.pt' does not exist"),
        ("profile", {"model": "net.py:build", "checkpoint": "weights.txt"}, "has an unknown format"),
        ("profile", {"model": "net.py:build", "metric": "net.py:absent"}, "net.py has no 'absent'"),
        ("prune", {"model": "net.py:build", "loss": "net.py:absent"}, "net.py has no 'absent'"),
        ("distill", {"model": "net.py:build", "student": "net.py:absent"}, "net.py has no 'absent'"),
        (
            "distill",
            {"model": "net.py:build", "student": "net.py:build", "student_checkpoint": "absent.pt"},
            "checkpoint 'absent.pt' does not exist",
        ),
        ("quantize", {"model": "net.py:build", "output": "out"}, "output 'out' exists already"),
        ("quantize", {"model": "net.py:build", "output": "net.py/x/y"}, "output 'net.py/x/y' cannot be created"),
        ("compare", {"a": "quantize-20260101-0000-aaaa", "b": "nothing"}, "'nothing' is not an artifact"),
    ],
)
def test_what_is_named_and_not_there_is_refused_before_a_run_starts(
    files: Path, verb: str, arguments: dict[str, Any], said: str
) -> None:
    before = sorted(runs_root(files).iterdir())
    with pytest.raises(OmgoptimError) as refused:
        submit(verb, parse(verb, arguments), files)
    assert said in refused.value.what
    assert sorted(runs_root(files).iterdir()) == before


def test_a_file_without_a_callable_lists_what_it_has(files: Path) -> None:
    with pytest.raises(OmgoptimError) as refused:
        check_references(parse("profile", {"model": "net.py"}), files)
    assert refused.value.fix == "`model='net.py:Net'`; `model='net.py:build'`; `model='net.py:load'`"


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "net.py:build", "data": "net.py:load"},
        {"model": "net.py:late"},
        {"model": "net.py:nn.Linear"},
        {"model": "net.py:Net", "data": "data.npz"},
        {"model": "dynamic.py:build"},
        {"model": "broken.py:build"},
        {"model": "a_package.of_mine:build"},
        {"model": "timm:resnet18"},
        {"model": "hf:some/model"},
        {"model": "quantize-20260101-0000-aaaa"},
        {"model": "out"},
        {"model": "(live module)", "data": "(live data)"},
    ],
    ids=lambda arguments: arguments["model"],
)
def test_what_only_the_run_can_tell_passes(files: Path, arguments: dict[str, Any]) -> None:
    check_references(parse("profile", arguments), files)


def test_the_check_runs_no_code_and_needs_no_torch(files: Path) -> None:
    (files / "marks.py").write_text(f"open({str(files / 'mark')!r}, 'w').close()\ndef build(): ...\n")
    code = (
        "import sys; from pathlib import Path\n"
        "from omgoptim.jobs.preflight import check_references; from omgoptim.requests import parse\n"
        "check_references(parse('profile', {'model': 'marks.py:build'}), Path(sys.argv[1]))\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(files)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert not (files / "mark").exists()
