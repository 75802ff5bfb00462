"""Bad input through the shell, as a user meets it: its own clear error, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLI = [sys.executable, "-c", "from omgoptim.cli import main; main()"]
ROOT = Path(__file__).parents[1]

NET = """
import sys, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8, nan=False):
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)
        if nan:
            self.head.weight.data.fill_(float("nan"))
    def forward(self, x):
        return self.head(self.body(x).relu())

def not_a_module(): return {"weights": 1}
def raises(): raise ValueError("the weights were lost")
def exits(): sys.exit(3)
def hangs():
    while True: time.sleep(0.01)
def loud():
    print("x" * 2_000_000)
    return Net()
def load(split): return [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(8)]
def empty(split): return []
def no_calibration(split): return load(split) if split == "eval" else []
def wide(split): return [(torch.randn(8, 5), torch.randint(0, 3, (8,)))]
def nan_data(split): return [(torch.full((8, 4), float("nan")), torch.randint(0, 3, (8,)))]
number = 7
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "needs.py").write_text("import a_package_of_theirs\n\ndef build(): ...\n")
    (tmp_path / "broken.py").write_text("def build(:\n")
    return tmp_path


def run(project: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMGOPTIM_")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*CLI, *arguments], cwd=project, capture_output=True, text=True, timeout=120, env=environment | (env or {})
    )


LOAD = ("--data", "net.py:load")

REFUSED = {
    "missing file": (["profile", "nowhere.py:build", *LOAD], 3, "nowhere.py", "does not exist"),
    "no such callable": (["profile", "net.py:Nett", *LOAD], 3, "Nett", "Net"),
    "no such module": (["profile", "no.such.thing:Net", *LOAD], 3, "no.such.thing", "module"),
    "no module": (["profile", "net.py:not_a_module", *LOAD], 3, "dict", "torch.nn.Module"),
    "not callable": (["profile", "net.py:number", *LOAD], 3, "int", "callable"),
    "broken code": (["profile", "broken.py:build", *LOAD], 3, "broken.py", "SyntaxError"),
    "code that raises": (["profile", "net.py:raises", *LOAD], 3, "the weights were lost", "ValueError"),
    "code that exits": (["profile", "net.py:exits", *LOAD], 3, "sys.exit(3)", "__main__"),
    "code that hangs": (
        ["profile", "net.py:hangs", *LOAD, "--time-limit-s", "2"], 3, "did not return", "--time-limit-s",
    ),
    "missing package": (["profile", "needs.py:build", *LOAD], 3, "a_package_of_theirs", "pip install"),
    "shapes that do not fit": (["profile", "net.py:Net", "--data", "net.py:wide"], 3, "layer 'body'", "(2, 5)"),
    "NaN outputs": (["profile", "net.py:Net", "--model-kwargs", "nan=true", *LOAD], 3, "NaN", "outputs"),
    "empty calibration data": (
        ["quantize", "net.py:Net", "--data", "net.py:no_calibration", "--scheme", "static"], 3, "calibration", "empty",
    ),
    "empty evaluation data": (["profile", "net.py:Net", "--data", "net.py:empty"], 3, "eval", "empty"),
    "no data and no shapes": (["profile", "net.py:Net"], 3, "--inputs", "--data"),
    "unknown engine": (["quantize", "net.py:Net", *LOAD, "--runtime", "onnxruntim"], 2, "onnxruntim", "onnxruntime"),
    "unknown argument": (
        ["quantize", "net.py:Net", "--scheme", "dynamic", "--calibration-samples", "5"], 2, "calibration", "static",
    ),
    "unknown scheme": (["quantize", "net.py:Net", *LOAD, "--scheme", "statik"], 2, "statik", "static"),
    "path outside the project": (["profile", "../net.py:Net", *LOAD], 2, "outside the project", "--allow-path"),
    "bad shape": (["profile", "net.py:Net", "--inputs", "1y4"], 2, "1y4", "1x3x224x224"),
    "no teacher": (["distill", "--student", "net.py:Net", *LOAD], 2, "distill needs 'model'", "teacher="),
    "nothing to distill on": (
        ["distill", "--teacher", "net.py:Net", "--inputs", "1x4"], 3, "training data", "load('train')",
    ),
    "no such student": (["distill", "net.py:Net", *LOAD, "--student", "narow"], 3, "narow", "narrow"),
    "no such run": (["compare", "quantize-1", "quantize-2"], 3, "quantize-1", "runs list"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_each_bad_input_has_its_own_error_and_leaves_nothing_behind(project: Path, case: str) -> None:
    arguments, code, *words = REFUSED[case]
    result = run(project, *arguments, "--json")
    assert result.returncode == code, result.stderr
    error = json.loads(result.stdout)["error"]
    text = " ".join(error[part] for part in ("what", "why", "fix"))
    assert all(word in text for word in words), text
    assert " ".join(error["what"].split()) in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    left = [path.name for run_folder in project.glob(".omgoptim/runs/*") for path in run_folder.iterdir()]
    assert not {"work", "artifact", "report.json", "report.html"} & set(left)
    assert not [name for name in left if "partial" in name]


def test_a_pickled_whole_module_is_refused_and_never_opened(project: Path) -> None:
    trap = "import os\nclass Trap:\n    def __reduce__(self): return (os.mkdir, ('opened',))\n"
    make = trap + "import torch\ntorch.save(Trap(), 'whole.pt')\n"
    subprocess.run([sys.executable, "-c", make], cwd=project, check=True)
    for arguments in (["profile", "whole.pt"], ["profile", "net.py:Net", "--checkpoint", "whole.pt"]):
        result = run(project, *arguments, *LOAD)
        assert result.returncode == 3
        assert "state_dict" in result.stderr or "--checkpoint" in result.stderr
        assert not (project / "opened").exists()


def test_a_state_dict_that_does_not_fit_names_its_keys(project: Path) -> None:
    make = "import torch, net\ntorch.save({'state_dict': net.Net(width=9).state_dict()}, 'w.pt')"
    subprocess.run([sys.executable, "-c", make], cwd=project, check=True)
    result = run(project, "profile", "net.py:Net", "--checkpoint", "w.pt", *LOAD)
    assert result.returncode == 3
    assert "body.weight has shape (9, 4) in the file and (8, 4) in the model" in " ".join(result.stderr.split())


def test_code_that_prints_a_lot_disturbs_nothing(project: Path) -> None:
    result = run(project, "profile", "net.py:loud", *LOAD, "--json", "--timing", "quick")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["outcome"] == "ok"
    assert len(result.stderr) < 20_000
    (log,) = project.glob(".omgoptim/runs/*/log.txt")
    assert "x" * 1000 in log.read_text()


@pytest.fixture
def project_with_venv(project: Path) -> Path:
    """A project whose own .venv has one package more than the Python that runs omgoptim."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(project / ".venv")], check=True)
    (site,) = (project / ".venv").glob("lib/python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "ours.pth").write_text(ours + "\n")
    (site / "only_theirs.py").write_text("from torch import nn\nLayer = nn.Linear\n")
    (project / "theirs.py").write_text("import only_theirs\ndef build(): return only_theirs.Layer(4, 3)\n")
    return project


def test_a_model_whose_imports_are_only_in_the_projects_venv_works(project_with_venv: Path) -> None:
    result = run(project_with_venv, "profile", "theirs.py:build", *LOAD, "--json", "--timing", "quick")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert ".venv" in report["environment"]["python"]


def test_what_the_projects_venv_lacks_is_named_with_its_install_command(project: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(project / ".venv")], check=True)
    result = run(project, "profile", "net.py:Net", *LOAD)
    assert result.returncode == 3
    text = " ".join(result.stderr.split())
    assert "torch" in text
    assert f"{project}/.venv/bin/python -m pip install" in text.replace("\n", "")
