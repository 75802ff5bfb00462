"""The user's project folder, and the projects that a server serves.

A shell command or a Python call may name any project. A tool call comes from an assistant, which may only name the
projects that the user configured for the server: see `served_projects`.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from omgoptim.errors import RequestError

PLUGIN_ROOTS = ("CLAUDE_PLUGIN_ROOT", "PLUGIN_ROOT")
"""Set by an assistant that started this process as a plugin: the plugin's own folder."""

NAMED_BY = ("OMGOPTIM_PROJECT", "CLAUDE_PROJECT_DIR")
"""Environment variables that name one project; the first that is set is the default."""

SERVED = "OMGOPTIM_PROJECTS"
"""Environment variable that lists further projects of a server, separated as in PATH."""

ALLOWED = "OMGOPTIM_ALLOW_PATH"


def find_project(explicit: str | None) -> Path:
    """Return the resolved project folder: the argument, OMGOPTIM_PROJECT, CLAUDE_PROJECT_DIR or the working directory.

    Raises:
        RequestError: it is not an existing folder, or the working directory cannot be the project (the plugin's own
            folder, the root of the file system).
    """
    named = [(explicit, "the argument 'project'"), *((os.environ.get(name), name) for name in NAMED_BY)]
    for value, source in named:
        if value:
            return _existing(value, source)
    here = Path.cwd().resolve()
    if here.parent == here or _is_in_plugin(here):
        raise RequestError(
            "the project is unknown",
            f"the working directory is {here}, which cannot be a project",
            "give project=<absolute path of your project>, or set OMGOPTIM_PROJECT",
        )
    return here


def served_projects() -> list[Path]:
    """Return the projects that the user configured for this server, resolved, the default first.

    OMGOPTIM_PROJECT, CLAUDE_PROJECT_DIR, the working directory, and the list in OMGOPTIM_PROJECTS. Not the
    working directory if it is the root, the home folder or a parent of it, or the plugin's own folder.
    """
    here = Path.cwd().resolve()
    given = [os.environ.get(name, "") for name in NAMED_BY]
    given += [] if _is_too_wide(here) or _is_in_plugin(here) else [str(here)]
    given += os.environ.get(SERVED, "").split(os.pathsep)
    folders = [folder for text in given if text and (folder := _folder(text)) is not None]
    return list(dict.fromkeys(folders))


def served_project(explicit: str | None) -> Path:
    """Return the resolved project of a tool call: one that the user configured, or a folder in it.

    Raises:
        RequestError: it is none of those, or its runs lie elsewhere; `fix` is the line that adds it.
    """
    served = served_projects()
    if explicit is None:
        return _with_own_runs(_only(served), served)
    project = _existing(explicit, "the argument 'project'")
    if any(project.is_relative_to(folder) for folder in served):
        return _with_own_runs(project, served)
    raise RequestError(
        f"this server does not serve the project '{explicit}'",
        f"it serves {_listed(served)}; only the user may add projects",
        f"ask the user to add this to the server's environment and start it again: {_entry([*served, project])}",
    )


def plugin_roots() -> list[Path]:
    """Return the plugin folders that this process was started from; empty if it is not a plugin."""
    return [Path(os.environ[name]).resolve() for name in PLUGIN_ROOTS if os.environ.get(name)]


def _only(served: list[Path]) -> Path:
    """Return the default project of a server."""
    for name in NAMED_BY:
        if os.environ.get(name):
            return _existing(os.environ[name], name)
    here = Path.cwd().resolve()
    if here in served:
        return here
    if len(served) == 1:
        return served[0]
    raise RequestError(
        "the project is unknown",
        f"the working directory is {here}, which cannot be a project; the server serves {_listed(served)}",
        "give project=<absolute path of one of them>"
        if served
        else "ask the user to add this to the server's environment and start it again: OMGOPTIM_PROJECT=<path>",
    )


def _with_own_runs(project: Path, served: list[Path]) -> Path:
    """Return the project, unless its folder of runs is a link out of what the server serves."""
    runs = (project / ".omgoptim" / "runs").resolve()
    allowed = [folder for text in os.environ.get(ALLOWED, "").split(os.pathsep) if text and (folder := _folder(text))]
    if any(runs.is_relative_to(folder) for folder in (*served, *allowed)):
        return project
    raise RequestError(
        "the runs of this project lie outside of what the server serves",
        f"{project / '.omgoptim'} leads to {runs}",
        f"ask the user to add this to the server's environment and start it again: {ALLOWED}={shlex.quote(str(runs))}",
    )


def _existing(value: str, source: str) -> Path:
    path = _folder(value)
    if path is None:
        raise RequestError(
            f"the project folder '{value[:200]}' does not exist",
            f"it came from {source}" + (f"; it has {len(value)} characters" if len(value) > 200 else ""),
            "give the absolute path of an existing folder",
        )
    return path


def _folder(text: str) -> Path | None:
    """Return an existing folder, links resolved; None if it does not exist or is not a valid name."""
    try:
        path = Path(text).expanduser()
        return path.resolve() if path.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, holds a NUL, ~ of an unknown user
        return None


def _is_in_plugin(folder: Path) -> bool:
    return any(folder == root or root in folder.parents for root in plugin_roots())


def _is_too_wide(folder: Path) -> bool:
    """Return whether a folder is too broad for a project: the root, the home folder, or a parent of it."""
    try:
        home = Path.home().resolve()
    except (OSError, RuntimeError):
        return folder.parent == folder
    return folder.parent == folder or home.is_relative_to(folder)


def _listed(served: list[Path]) -> str:
    return ", ".join(map(str, served[:10])) or "none"


def _entry(folders: list[Path]) -> str:
    """Return the environment variable that makes a server serve these projects."""
    return f"{SERVED}={shlex.quote(os.pathsep.join(map(str, folders)))}"
