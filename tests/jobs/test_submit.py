from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from omgoptim.bootstrap import PACKAGE_FILE, USER_PATH
from omgoptim.errors import SetupError
from omgoptim.jobs.actions import cancel
from omgoptim.jobs.folder import RunFolder, runs_root
from omgoptim.jobs.interpreter import Interpreter, worker_environment
from omgoptim.jobs.submit import launch, submit
from omgoptim.reports import RunState
from omgoptim.requests import parse

Launch = Callable[..., RunFolder]
Ended = Callable[[RunFolder], RunState]
InStage = Callable[[RunFolder, str], RunState]


def test_a_python_without_the_packages_is_refused_with_the_install_command_and_nothing_is_left(
    project: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    (project / "net.py").write_text("def build(): ...")
    with pytest.raises(SetupError, match="lacks torch, numpy, pydantic") as caught:
        submit("profile", parse("profile", {"model": "net.py:build", "python": str(python)}), project)
    assert str(python) in caught.value.fix
    assert "pip" in caught.value.fix
    assert "torch numpy pydantic safetensors onnx onnxscript onnxruntime thop" in caught.value.fix
    assert not (project / ".omgoptim").exists()


def test_the_request_reaches_the_run_as_it_was_asked(start: Launch, project: Path, ended: Ended) -> None:
    folder = start(
        "print('SCHEME', request.scheme.scheme, request.scheme.calibration_samples, request.timing)\n"
        "print('CONTEXT', context.found_by, context.project, os.getcwd(), os.environ['OMGOPTIM_PROJECT'])\n"
        "return report(context)",
        verb="quantize",
        scheme={"scheme": "static", "calibration_samples": 7},
        timing="quick",
        plan=True,
    )
    assert ended(folder).model == "net.py:build"
    log = folder.log_file.read_text()
    assert "SCHEME static 7 quick" in log
    assert f"CONTEXT the test {project} {project} {project}" in log
    assert folder.read_request().request["scheme"]["calibration_samples"] == 7


def test_the_worker_leads_a_session_of_its_own_and_sees_none_of_the_submitters_python_settings(
    start: Launch, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    folder = start(
        "assert os.getsid(0) == os.getpid() != os.getppid()\nassert 'PYTHONPATH' not in os.environ\n"
        "assert '/somewhere/else' not in sys.path and '' not in sys.path\nreturn report(context)"
    )
    assert ended(folder).status == "done"


def test_only_the_users_own_folders_of_pythonpath_are_handed_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    packages = Path("/elsewhere/lib/python3.10/site-packages")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, ("", "src", packages, PACKAGE_FILE.parent.parent))))
    assert worker_environment()[USER_PATH] == str(project / "src")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    assert USER_PATH not in worker_environment()


def test_a_file_of_a_folder_of_pythonpath_does_not_replace_an_installed_package(
    start: Launch, ended: Ended, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(project))
    (project / "filelock.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    folder = start("import filelock\nassert 'packages' in filelock.__file__\nreturn report(context)")
    assert ended(folder).status == "done"
    assert not (project / "ran").exists()


def test_a_python_that_cannot_be_started_is_a_failed_run_and_an_error(project: Path) -> None:
    gone = Interpreter(project / "python", "the test", "3.12.0", ())
    with pytest.raises(SetupError, match="could not be started"):
        launch("profile", parse("profile", {"model": "net.py:build"}), project, gone)
    (folder,) = runs_root(project).iterdir()
    assert RunFolder(folder).stored_state().status == "failed"


SUBMITTER = """
import signal, sys
from pathlib import Path
from omgoptim.bootstrap import IMPORT_OMGOPTIM
from omgoptim.jobs.interpreter import Interpreter
from omgoptim.jobs.submit import launch
from omgoptim.requests import parse
project, program = Path(sys.argv[1]), sys.argv[2]
python = Interpreter(Path(sys.executable), "the test", "3.12.0", ())
folder = launch("profile", parse("profile", {"model": "net.py:build"}), project, python, IMPORT_OMGOPTIM + program)
print(folder.path, flush=True)
signal.pause()
"""


def test_a_run_goes_on_and_ends_properly_when_its_submitter_is_killed(
    project: Path, program: Callable[[str], str], ended: Ended, in_stage: InStage
) -> None:
    verb = program(
        "context.progress('holding', None)\nwhile not (context.project / 'go').exists(): pass\nreturn report(context)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", SUBMITTER, str(project), verb], stdout=subprocess.PIPE, text=True
    ) as submitter:
        assert submitter.stdout is not None
        folder = RunFolder(Path(submitter.stdout.readline().strip()))
        in_stage(folder, "holding")
        os.kill(submitter.pid, signal.SIGKILL)
    assert submitter.returncode == -signal.SIGKILL
    assert folder.stored_state().status == "running"
    (project / "go").touch()
    assert ended(folder).status == "done"


def test_a_submitter_that_ends_leaves_no_warning_behind(project: Path, program: Callable[[str], str]) -> None:
    code = SUBMITTER.replace("signal.pause()", "")
    verb = program("hold(context)")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code, str(project), verb],
        capture_output=True,
        text=True,
        check=True,
    )
    folder = RunFolder(Path(done.stdout.strip()))
    assert cancel(folder, grace_s=0).status == "cancelled"
    assert done.stderr == ""


def test_the_submit_side_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import json, sys\n"
        "import omgoptim.jobs.submit, omgoptim.jobs.follow, omgoptim.jobs.actions, omgoptim.jobs.project\n"
        "import omgoptim.jobs.doctor, omgoptim.jobs.device_queue\n"
        "print(json.dumps([name for name in ('torch', 'numpy') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
