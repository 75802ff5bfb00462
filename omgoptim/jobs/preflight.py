"""Check what a request names before a run starts: files, callables, runs. Milliseconds, no torch, no user code run.

What takes loading is left to the run. Nothing here may refuse what the run would accept: a file that cannot be read as
Python, or that makes its names at run time, passes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omgoptim.errors import ArtifactError, ModelError, UnknownModelError, argument, did_you_mean
from omgoptim.jobs.folder import run_folders, runs_root
from omgoptim.models.security.file_integrity import read_regular_file
from omgoptim.models.security.path_policy import PathPolicy, error_about
from omgoptim.requests import Request, technique_field

LIBRARIES = ("hf", "timm", "torchvision")
FILES = {
    "model": (".onnx", ".pt2"),
    "data": (".npz", ".safetensors"),
}
"""File name endings of models and data that are read without running code, by argument."""

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
DYNAMIC = ("import *", "globals(", "__getattr__", "setattr(", "exec(", "vars(")
"""Text that indicates names defined at run time, which parsing cannot find."""

MOST_CODE_BYTES = 2**21
"""A larger Python file is left to the run: looking for its names would take seconds."""


def check_named(request: Request, project: Path) -> None:
    """Check that everything a request names exists.

    Raises:
        RequestError: a path outside of what the request grants, or an output that exists.
        ModelError, DataError, ArtifactError: a file, a callable or a run that is not there.
    """
    policy = PathPolicy.of(project, getattr(request, "allow_path", ()), getattr(request, "allow_module", ()))
    for what, text in _sources(request):
        if text.startswith("(live "):  # an object of the caller's process
            continue
        if what == "checkpoint":
            _check_weights(text, policy)
        else:
            _check_source(what, text, policy)
    output = getattr(request, "output", None)
    if output is not None:
        policy.new_folder(output, "output")


def _sources(request: Request) -> Iterator[tuple[str, str]]:
    """Yield the argument's name and value for everything that the request names."""
    for name in ("model", "a", "b", "checkpoint", "data", "metric", "loss"):
        value = getattr(request, name, None)
        if isinstance(value, str) and (name not in ("metric", "loss") or ":" in value):
            yield name, value
    technique = technique_field(type(request))
    params: Any = getattr(request, technique) if technique else None
    if params is not None and params.by_source and ":" in params.source:  # a bare word may mean a method
        yield "model", params.source
    student_weights = getattr(params, "student_checkpoint", None)
    if isinstance(student_weights, str):
        yield "checkpoint", student_weights


def _check_source(what: str, text: str, policy: PathPolicy) -> None:
    source, _, name = text.rpartition(":")
    if text.partition(":")[0] in LIBRARIES:
        return
    if source.endswith(".py") and name:
        _check_callable(what, source, name, policy)
    elif text.endswith(".py"):
        found = "; ".join(argument(what, f"{text}:{one}") for one in _callables(policy.file(text, what)))
        raise error_about(what)(
            f"{what} '{text}' is a file without the name of a callable", "the form is file.py:callable", found
        )
    elif text.endswith(FILES.get(what, ())):
        policy.file(text, what)
    elif what in ("model", "a", "b") and not source and Path(text).suffix not in WEIGHTS:
        _check_run_or_folder(what, text, policy)


def _check_callable(what: str, source: str, name: str, policy: PathPolicy) -> None:
    path = policy.file(source, what)
    names = _names(path)
    if names is not None and name.split(".")[0] not in names:
        known = [one for one in _callables(path) if not one.startswith("_")]
        raise error_about(what)(f"{source} has no '{name}'", did_you_mean(name, known))


def _check_run_or_folder(what: str, text: str, policy: PathPolicy) -> None:
    """Check a run id or an artifact folder."""
    ids = [folder.id for folder in run_folders(policy.project)]
    if text in ids or _is_folder(policy.project, text):
        return
    near = did_you_mean(text, ids[-10:]) if ids else f"{runs_root(policy.project)} has no runs yet"
    if what != "model":
        raise ArtifactError(
            f"'{text}' is not an artifact",
            f"it is neither a run of this project nor an artifact folder. {near}",
            "omgoptim runs list",
        )
    raise UnknownModelError(
        f"'{text}' is not a model",
        f"no run, artifact folder or file of that name was found in the project. {near}",
        "give path/to/file.py:callable, package.module:callable, model.pt2, model.onnx, hf:…, timm:… or a run id",
    )


def _is_folder(project: Path, text: str) -> bool:
    try:
        return (project / Path(text).expanduser()).is_dir()
    except (OSError, RuntimeError, ValueError):  # too long for a name; ~ of an unknown user
        return False


def _check_weights(text: str, policy: PathPolicy) -> None:
    path = policy.file(text, "checkpoint")
    if path.is_file() and path.suffix not in WEIGHTS:
        raise ModelError(f"checkpoint {path.name} has an unknown format", f"known: {', '.join(WEIGHTS)}")


def _names(path: Path) -> set[str] | None:
    """Return the names that a file may define; None if they are known only after running it."""
    try:
        text = read_regular_file(path, MOST_CODE_BYTES).decode("utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if any(word in text for word in DYNAMIC):
        return None
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return found


def _callables(path: Path) -> list[str]:
    """Return the functions and classes at the top of a file, in its order."""
    try:
        tree = ast.parse(read_regular_file(path, MOST_CODE_BYTES).decode("utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
