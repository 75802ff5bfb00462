"""Permissions of a tool call: the projects, Pythons and runs that the user granted the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omgoptim.errors import RequestError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.interpreter import allowed_python
from omgoptim.jobs.project import served_project, served_projects
from omgoptim.requests import Request
from omgoptim.requests.limits import shortened
from omgoptim.requests.training import is_head
from omgoptim.server.tools import SHELL_ONLY

HEAD = "RAY_API_SERVER_ADDRESS"
"""Environment variable, Ray's own: the head that takes jobs."""


def resolve_call(request: Request) -> tuple[Path, Request]:
    """Return the project of a call, and its request with its Python resolved.

    Raises:
        RequestError: the user gave the server neither that project nor one that holds it, or the Python is not
            one of those found.
    """
    project = served_project(getattr(request, "project", None))
    _refuse_other_head(getattr(request, "on", "local"))
    python = getattr(request, "python", None)
    if python is None:
        return project, request
    found = allowed_python(project, python, served_projects())
    return project, request.model_copy(update={"python": str(found)})


def _refuse_other_head(on: str) -> None:
    """Refuse a Ray head that the user did not name: the whole project is sent there.

    Raises:
        RequestError: it is another than that of RAY_API_SERVER_ADDRESS.
    """
    if is_head(on) and on.rstrip("/") != os.environ.get(HEAD, "").rstrip("/"):
        raise RequestError(
            f"the project cannot be sent to {on}",
            "only the user may decide where it is sent",
            f"ask the user to run the command in a shell, or to set {HEAD}={on} in the server's environment",
        )


def refuse_shell_only(arguments: dict[str, Any]) -> None:
    """Refuse arguments that only the user may set.

    Raises:
        RequestError: one of them is given.
    """
    for name in SHELL_ONLY:
        if arguments.get(name):
            raise RequestError(
                f"'{name}' cannot be given to a tool",
                "only the user may decide what is read and whose code runs",
                "ask the user to run the command in a shell, or to set OMGOPTIM_ALLOW_PATH or OMGOPTIM_ALLOW_MODULE in "
                "the server's environment",
            )


def refuse_to_resume(folder: RunFolder, project: Path) -> None:
    """Refuse a run whose request.json has arguments that an agent may not give.

    Raises:
        RequestError: it is of another project, in a Python that is not found, or with an argument for the shell only.
    """
    submission = folder.read_request()
    fix = f"ask the user to resume it in a shell: omgoptim runs resume {folder.id}"
    if submission.project.resolve() != project:
        raise RequestError(
            f"run {folder.id} belongs to another project", f"its request.json says {submission.project}", fix
        )
    _refuse_other_head(str(submission.request.get("on", "local")))
    granted = [name for name in SHELL_ONLY if submission.request.get(name)]
    if granted:
        given = f"its request.json says {granted[0]}={shortened(submission.request[granted[0]])}"
        raise RequestError(f"run {folder.id} has an argument that only the user may set", given, fix)
    try:
        allowed_python(project, submission.python, served_projects())
    except RequestError as error:
        raise RequestError(f"run {folder.id} ran in a Python that is not found here", error.what, fix) from None
