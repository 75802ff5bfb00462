"""Choice of the Python that runs the worker, and the packages that it lacks.

The user's model needs the user's packages, so the worker runs in the user's Python. Only omgoptim itself is
added: `bootstrap.py` loads it from its own folder, without making the rest of that folder importable.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from omgoptim.bootstrap import PACKAGE_FILE, USER_PATH
from omgoptim.errors import RequestError, SetupError
from omgoptim.jobs.project import plugin_roots
from omgoptim.text import clean

REQUIRED = (
    "torch", "numpy", "pydantic", "safetensors", "onnx", "onnxscript", "onnxruntime", "thop", "sympy", "filelock",
    "psutil", "typing_extensions",
)  # fmt: skip
OLDEST = (3, 10)
"""Oldest supported Python: `requires-python` of pyproject.toml."""

CHECK_LIMIT_S = 10.0
"""Time limit for starting a Python, which imports nothing but the standard library. Chosen: for a cold start on a
network disk."""

OWN = "the Python that omgoptim itself runs in"

_COMMAND = re.compile(r"(?:python|pypy)\d*(?:\.\d+)*t?(?:\.exe)?")
"""Pattern of the file name of a Python interpreter."""

_CHECK = """\
import sys
sys.path[:] = [entry for entry in sys.path if entry]
print("omgoptim:version %d.%d.%d" % sys.version_info[:3])
import importlib.util
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        print("omgoptim:missing " + name)
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python with its version and missing packages."""

    path: Path
    found_by: str
    """Source of the choice, for instance `the project's .venv`."""
    version: str
    missing: tuple[str, ...]
    """Required packages that this Python lacks, by the names to install."""
    has_pip: bool = True
    to_create: Path | None = None
    """The environment to make first, where this Python is only the plugin's own and the project has none."""

    def install_command(self, *packages: str) -> str:
        """Return the one command that installs packages into this Python, or into the environment to make first."""
        names = " ".join(_quoted(package) for package in packages)
        if self.to_create:
            place = "Scripts/python.exe" if os.name == "nt" else "bin/python"
            made = _quoted(str(self.to_create / place))
            return f"python3 -m venv {_quoted(str(self.to_create))} && {made} -m pip install {names}"
        python = _quoted(str(self.path))
        if self.has_pip:
            return f"{python} -m pip install {names}"
        if shutil.which("uv"):
            return f"uv pip install --python {python} {names}"
        return f"{python} -m ensurepip && {python} -m pip install {names}"

    def uninstall_command(self, package: str) -> str:
        """Return the one command that removes a package from this Python."""
        python = _quoted(str(self.path))
        pip = f"{python} -m pip uninstall" if self.has_pip else f"uv pip uninstall --python {python}"
        return f"{pip} {_quoted(package)}"


def find_interpreter(project: Path, explicit: str | None) -> Interpreter:
    """Return the Python for a project's runs.

    In this order: the argument, OMGOPTIM_PYTHON, the project's .venv, VIRTUAL_ENV, CONDA_PREFIX, the Python that runs
    this code.

    Raises:
        SetupError: the Python that was named does not exist, or the one that was found does not run.
    """
    path, found_by = _choose(project, explicit)
    try:
        answer = subprocess.run(
            [str(path), "-c", _CHECK, *REQUIRED, "setuptools", "pip"],
            capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=clean_environment(),
            cwd=project, timeout=CHECK_LIMIT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _does_not_run(path, found_by, str(error)) from None
    lines = answer.stdout.splitlines()
    version = next((line.split()[1] for line in lines if line.startswith("omgoptim:version ")), None)
    if version is None or (answer.returncode != 0 and _parsed(version) >= OLDEST):
        raise _does_not_run(path, found_by, answer.stderr.strip() or f"exit status {answer.returncode}")
    missing = [line.split()[1] for line in lines if line.startswith("omgoptim:missing ")]
    needs_setuptools = _parsed(version) >= (3, 12)  # thop imports distutils
    needed = [name for name in missing if name != "pip" and (name != "setuptools" or needs_setuptools)]
    if found_by == OWN and "torch" in missing and plugin_roots():
        return Interpreter(path, found_by, version, (*REQUIRED, "setuptools"), to_create=project / ".venv")
    return Interpreter(path, found_by, version, tuple(needed), "pip" not in missing)


def allowed_python(project: Path, named: str, served: Sequence[Path]) -> Path:
    """Return the Python that an agent names, if it is one that is found without being named.

    Naming an executable is running it. So only these: OMGOPTIM_PYTHON, the project's .venv, VIRTUAL_ENV, CONDA_PREFIX,
    the Python that runs this code, and `python…` in a folder of the PATH that is absolute and outside of every project.

    Args:
        project: of the call.
        named: a command (`python3.12`), or the path of a Python or of its environment's folder.
        served: the projects of the server.

    Raises:
        RequestError: it is none of those; `why` lists them.
    """
    found, requested = _found_pythons(project), None
    on_path = [Path(text) for text in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(text)]
    on_path = [folder for folder in on_path if not any(map(folder.resolve().is_relative_to, served))]
    if "/" not in named and os.sep not in named:
        requested = shutil.which(named, path=os.pathsep.join(map(str, on_path))) if _COMMAND.fullmatch(named) else None
    else:
        with suppress(OSError, RuntimeError, ValueError):  # too long, ~ of an unknown user
            requested = os.path.abspath(project / Path(named).expanduser())
    if requested is not None:
        python = next(
            (one for one in found if Path(requested) in (one, one.parent, one.parent.parent)), Path(requested)
        )
        if python in found or (python.parent in on_path and _COMMAND.fullmatch(python.name) and os.path.isfile(python)):
            return python
    raise RequestError(
        f"'{named}' is not a Python that an agent may name",
        f"naming a program runs it; found are {', '.join(map(str, found))}, and python commands on the PATH",
        "leave python out; or ask the user to set OMGOPTIM_PYTHON in the server's environment, or to run the command "
        "in a shell with --python",
    )


def _found_pythons(project: Path) -> list[Path]:
    """Return all Pythons that are found without being named."""
    found = [Path(sys.executable), *(python for python, _ in _of_environments(project))]
    variable = os.environ.get("OMGOPTIM_PYTHON")
    if variable:
        with suppress(SetupError):
            found.append(_named(project, variable, "OMGOPTIM_PYTHON"))
    return list(dict.fromkeys(Path(os.path.abspath(python)) for python in found))


def require(interpreter: Interpreter) -> None:
    """Refuse a Python that is too old or lacks packages.

    Raises:
        SetupError: it is too old, or lacks packages; `fix` is the one command that installs them.
    """
    if not is_new_enough(interpreter):
        raise SetupError(
            f"Python {interpreter.version} is too old",
            f"{interpreter.path} ({interpreter.found_by}); omgoptim needs {OLDEST[0]}.{OLDEST[1]} or newer",
            "give python=<path of a newer Python that has the model's packages>",
        )
    install = interpreter.install_command(*interpreter.missing)
    if interpreter.to_create:
        raise SetupError(
            "the project has no Python environment to run the model in",
            "there is no .venv in the project and no active environment, and the plugin's own Python has no torch",
            install,
        )
    if interpreter.missing:
        raise SetupError(
            f"the Python that would run the model lacks {', '.join(interpreter.missing)}",
            f"{interpreter.path} ({interpreter.found_by}, Python {interpreter.version})",
            install,
        )


def is_new_enough(interpreter: Interpreter) -> bool:
    """Return whether an interpreter has a supported version of Python."""
    return _parsed(interpreter.version) >= OLDEST


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would make another Python load this one's files."""
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONSTARTUP", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in ours}


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: clean, with the folders of PYTHONPATH that are the user's own in `USER_PATH`.

    Left out are folders of packages, of this Python's installation, and the one that omgoptim lies in. PYTHONPATH is
    not set itself: a `torch.py` in one of them would replace torch before any code of the project is named.
    """
    entries = [Path(entry).absolute() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kept = [str(entry) for entry in entries if not _is_of_this_python(entry.resolve())]
    return clean_environment() | ({USER_PATH: os.pathsep.join(kept)} if kept else {})


def _is_of_this_python(folder: Path) -> bool:
    if {"site-packages", "dist-packages"} & set(folder.parts) or folder == PACKAGE_FILE.resolve().parent.parent:
        return True
    return any(folder.is_relative_to(Path(prefix).resolve() / "lib") for prefix in (sys.prefix, sys.base_prefix))


def _choose(project: Path, explicit: str | None) -> tuple[Path, str]:
    for value, source in ((explicit, "the argument 'python'"), (os.environ.get("OMGOPTIM_PYTHON"), "OMGOPTIM_PYTHON")):
        if value:
            return _named(project, value, source), source
    return next(_of_environments(project), (Path(sys.executable), OWN))


def _of_environments(project: Path) -> Iterator[tuple[Path, str]]:
    """Yield the Pythons of the project's environment and of the active ones, each with its source."""
    folders = [(str(project / ".venv"), "the project's .venv")]
    folders += [(os.environ.get(name, ""), name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    for folder, source in folders:
        python = _python_in(Path(folder)) if folder else None
        if python is not None:
            yield python, source


def _named(project: Path, value: str, source: str) -> Path:
    """Resolve a Python: a path (relative to the project), an environment's folder, or a command on the PATH."""
    path = project / Path(value).expanduser()
    found = _python_in(path) if path.is_dir() else path if path.is_file() else None
    if found is None and os.sep not in value:
        on_path = shutil.which(value)
        found = Path(on_path) if on_path else None
    if found is None:
        raise SetupError(
            f"there is no Python at '{value}'",
            f"it came from {source}; looked at {path}",
            "give the path of an existing Python, or leave it out to use the project's .venv or the active environment",
        )
    return found


def _python_in(folder: Path) -> Path | None:
    """Return the Python of an environment, links unresolved: the link's location selects the environment."""
    places = ("bin/python", "Scripts/python.exe", "python.exe")
    return next((folder / place for place in places if (folder / place).is_file()), None)


def _does_not_run(path: Path, found_by: str, reason: str) -> SetupError:
    return SetupError(
        f"the Python at {path} does not run",
        f"chosen through {found_by}; {clean(reason, 500)}",
        "repair that environment, or give python=<path of another>",
    )


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _quoted(text: str) -> str:
    return shlex.quote(text) if os.name == "posix" else f'"{text}"' if " " in text else text
