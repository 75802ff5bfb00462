"""Which folder is the user's project."""

from __future__ import annotations

import os
from pathlib import Path

from omgoptim.errors import RequestError

PLUGIN_ROOTS = ("CLAUDE_PLUGIN_ROOT", "PLUGIN_ROOT")
"""Set by an assistant that started this process as a plugin: the plugin's own folder."""


def find_project(explicit: str | None) -> Path:
    """The project folder, resolved: the argument, else OMGOPTIM_PROJECT, else CLAUDE_PROJECT_DIR, else where we are.

    Raises:
        RequestError: it is no existing folder, or the working directory cannot be the project (the plugin's own
            folder, the root of the file system).
    """
    named = [
        (explicit, "the argument 'project'"),
        (os.environ.get("OMGOPTIM_PROJECT"), "OMGOPTIM_PROJECT"),
        (os.environ.get("CLAUDE_PROJECT_DIR"), "CLAUDE_PROJECT_DIR"),
    ]
    for value, source in named:
        if value:
            return _existing(value, source)
    here = Path.cwd().resolve()
    if here.parent == here or _is_in_plugin(here):
        raise RequestError(
            "it is not known which project is meant",
            f"the working directory is {here}, which is no project",
            "give project=<absolute path of your project>, or set OMGOPTIM_PROJECT",
        )
    return here


def _existing(value: str, source: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_dir():
        raise RequestError(
            f"the project folder '{value}' does not exist",
            f"it came from {source}",
            "give the absolute path of an existing folder",
        )
    return path.resolve()


def plugin_roots() -> list[Path]:
    """Where this process was started from as a plugin; empty if it was not."""
    return [Path(os.environ[name]).resolve() for name in PLUGIN_ROOTS if os.environ.get(name)]


def _is_in_plugin(folder: Path) -> bool:
    return any(folder == root or root in folder.parents for root in plugin_roots())
