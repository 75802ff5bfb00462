from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from omgoptim.bootstrap import USER_PATH
from omgoptim.errors import DataError, ModelError, SetupError, UserCodeError
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.security.user_code import call_user, load_callable

Write = Callable[[str, str], Path]


def load(spec: str, policy: PathPolicy, limit_s: float = 60) -> object:
    return load_callable(spec, policy, "model", limit_s)


def test_a_callable_is_found_in_a_file_and_in_a_package_and_by_a_dotted_name(write: Write, policy: PathPolicy) -> None:
    write("lib/net.py", "class Net:\n    @staticmethod\n    def make(): return 1\n")
    write("lib/__init__.py", "")
    assert load("lib/net.py:Net.make", policy)() == 1  # type: ignore[operator]
    assert load("lib.net:Net", policy).make() == 1  # type: ignore[attr-defined]


def test_a_file_imports_its_neighbours_and_the_modules_of_the_project(write: Write, policy: PathPolicy) -> None:
    write("at_root.py", "one = 1")
    write("models/beside.py", "two = 2")
    write("models/net.py", "from at_root import one\nfrom beside import two\ndef build(): return one + two\n")
    assert load("models/net.py:build", policy)() == 3  # type: ignore[operator]


def test_a_file_imports_from_the_users_folders_of_pythonpath_after_the_projects_own(
    write: Write, policy: PathPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for number, folder in enumerate((first, second)):
        folder.mkdir()
        (folder / "listed_module.py").write_text(f"value = {number}")
        (folder / "own_module.py").write_text("value = 'not of the project'")
    write("own_module.py", "value = 2")
    write("uses.py", "import listed_module, own_module\ndef build(): return listed_module.value, own_module.value\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(USER_PATH, os.pathsep.join((str(first), str(second))))
    assert load("uses.py:build", policy)() == (0, 2)  # type: ignore[operator]


def test_two_files_of_one_name_are_distinguished_and_one_file_is_executed_once(
    write: Write, policy: PathPolicy
) -> None:
    write("a/net.py", "where = lambda: 'a'")
    write("b/net.py", "where = lambda: 'b'")
    first = load("a/net.py:where", policy)
    assert load("b/net.py:where", policy)() == "b"  # type: ignore[operator]
    assert load("a/net.py:where", policy) is first


def test_a_file_may_have_the_name_of_a_module_that_is_loaded_already(write: Write, policy: PathPolicy) -> None:
    write("json.py", "def build(): return 'mine'")
    assert load("json.py:build", policy)() == "mine"  # type: ignore[operator]
    assert hasattr(sys.modules["json"], "loads")


@pytest.mark.parametrize("spec", ["net.py", "net.py:", ":build", "net.py:1st", "net.py:build()"])
def test_a_spec_that_names_no_callable_is_an_error_with_the_right_form(spec: str, policy: PathPolicy) -> None:
    with pytest.raises(ModelError, match="is not a callable") as error:
        load(spec, policy)
    assert "file.py:callable or package.module:callable" in error.value.why


def test_a_missing_name_is_answered_with_the_nearest_callable(write: Write, policy: PathPolicy) -> None:
    write("net.py", "def build(): ...\ndef other(): ...\nsize = 3")
    with pytest.raises(ModelError, match="has no 'biuld'") as error:
        load("net.py:biuld", policy)
    assert error.value.why == "Did you mean 'build'? Known: build, other."
    with pytest.raises(DataError, match="has no 'x'"):
        load_callable("net.py:x", policy, "data", 60)


def test_a_missing_file_and_a_missing_module_are_separate_errors(policy: PathPolicy) -> None:
    with pytest.raises(ModelError, match=r"'net\.py' does not exist"):
        load("net.py:build", policy)
    for source in ("no_such_module", "no_such_package.net"):
        with pytest.raises(ModelError, match=f"there is no module '{source}'") as error:
            load(f"{source}:build", policy)
        assert "file.py:callable" in error.value.fix


def test_code_that_raises_gives_its_last_line_and_its_place_and_the_traceback_to_the_log(
    write: Write, policy: PathPolicy, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write("net.py", "def build():\n    raise ValueError('width must be even')\nbuild()\n")
    with pytest.raises(UserCodeError, match=r"importing net\.py raised an error") as error:
        load("net.py:build", policy)
    assert error.value.why == f"ValueError: width must be even ({path}:2)"
    assert "Traceback" in (log := capfd.readouterr().err)
    assert "in build" in log
    assert "net" not in sys.modules


def test_a_syntax_error_is_placed_in_the_users_file(write: Write, policy: PathPolicy) -> None:
    path = write("net.py", "import os\n\ndef build(:\n")
    with pytest.raises(UserCodeError) as error:
        load("net.py:build", policy)
    assert "SyntaxError" in error.value.why
    assert f"({path}:3)" in error.value.why


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="exceptions have notes since Python 3.11")
def test_an_errors_kind_and_first_words_stand_before_its_notes(write: Write, policy: PathPolicy) -> None:
    write("net.py", "error = ValueError('width ' + 'x' * 5000)\nerror.add_note('in layer 3')\nraise error\n")
    with pytest.raises(UserCodeError) as error:
        load("net.py:build", policy)
    assert error.value.why.startswith("ValueError: width xxx")
    assert "in layer 3" in error.value.why


def test_code_that_exits_the_process_is_an_error_of_its_own(write: Write, policy: PathPolicy) -> None:
    write("net.py", "import sys\nprint('bye')\nsys.exit(3)\n")
    with pytest.raises(UserCodeError, match=r"called sys\.exit\(3\)") as error:
        load("net.py:build", policy)
    assert "__main__" in error.value.fix


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(600)", "swallow()"])
def test_code_that_hangs_is_stopped_at_its_limit(write: Write, policy: PathPolicy, body: str) -> None:
    swallow = (
        "def swallow():\n    while True:\n        try: import time; time.sleep(600)\n        except Exception: pass\n"
    )
    write("net.py", f"{swallow}{body}\n")
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserCodeError, match=r"did not return within 0\.2 s") as error:
        load("net.py:build", policy, limit_s=0.2)
    assert "`time_limit_s=3600`" in error.value.fix
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_outside_of_the_main_thread_code_runs_without_a_limit() -> None:
    given: list[int] = []
    thread = threading.Thread(target=lambda: given.append(call_user("calling", 60, lambda: 7)))
    thread.start()
    thread.join()
    assert given == [7]


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(write: Write, policy: PathPolicy) -> None:
    write("net.py", "import no_such_package_of_ours.layers\n")
    with pytest.raises(SetupError, match="needs the package 'no_such_package_of_ours'") as error:
        load("net.py:build", policy)
    assert error.value.fix == f"{sys.executable} -m pip install no_such_package_of_ours"
    call_of_cv2 = [ModuleNotFoundError("No module named 'cv2'", name="cv2")]
    with pytest.raises(SetupError) as error:
        call_user("calling build", 60, lambda: (_ for _ in ()).throw(call_of_cv2[0]))
    assert error.value.fix.endswith("opencv-python-headless")


def test_a_module_that_is_missing_in_the_users_own_package_is_nothing_to_install(
    write: Write, policy: PathPolicy
) -> None:
    write("mine/__init__.py", "")
    write("net.py", "import mine.layers\n")
    with pytest.raises(UserCodeError) as error:
        load("net.py:build", policy)
    assert "No module named 'mine.layers'" in error.value.why


def test_code_that_prints_a_lot_prints_to_the_log(
    write: Write, policy: PathPolicy, capfd: pytest.CaptureFixture[str]
) -> None:
    write("net.py", "import os\nprint('x' * 300_000)\nos.system('echo from a child')\ndef build(): return 1\n")
    assert load("net.py:build", policy)() == 1  # type: ignore[operator]
    printed = capfd.readouterr().out
    assert printed.count("x") >= 300_000
    assert "from a child" in printed


def test_an_error_that_is_ours_passes_through_unchanged() -> None:
    ours = DataError("what", "why", "fix")

    def raise_it() -> None:
        raise ours

    with pytest.raises(DataError) as error:
        call_user("calling", 60, raise_it)
    assert error.value is ours
