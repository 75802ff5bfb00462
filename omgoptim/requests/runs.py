"""Requests on runs and on the setup."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from omgoptim.errors import RequestError, argument
from omgoptim.requests.base import Request, Short, Target


class RunsRequest(Request):
    """List runs; show, wait for, cancel or resume one; select another finalist."""

    action: Annotated[
        Literal["list", "show", "wait", "cancel", "resume", "pick"],
        Short("resume: continue a failed or cancelled run. pick: select another finalist."),
    ] = "list"
    """Action. resume: continue a failed or cancelled run from its last checkpoint; pick: replace the artifact by
    another finalist of the run, without a new run."""
    run_id: Annotated[str | None, Short("")] = None
    """Run to act on."""
    name: Annotated[str | None, Short("")] = None
    """For pick: name of one of the report's alternatives."""
    project: str | None = None
    """Absolute path of the project."""

    @model_validator(mode="after")
    def _run_id_where_needed(self) -> Self:
        if self.action != "list" and not self.run_id:
            raise ValueError(f"action '{self.action}' needs run_id; action 'list' shows the ids")
        if self.action == "pick" and not self.name:
            raise ValueError("action 'pick' needs name; action 'show' shows the alternatives")
        return self


class DoctorRequest(Request):
    """Report the engines, devices and optional packages of the project's Python, and how to install missing ones."""

    project: str | None = None
    """Absolute path of the project."""
    python: str | None = Field(None)
    """Python interpreter to check; default: the project's .venv, else the active environment."""
    target: Annotated[Target, Short("ssh://[user@]host[:port]")] = None
    """Check the machine ssh://[user@]host[:port] instead: processor, memory, Python and engines there."""
    clean: Annotated[bool, Short("")] = False
    """Remove what omgoptim has stored on the target."""

    @model_validator(mode="after")
    def _clean_needs_target(self) -> Self:
        if self.clean and self.target is None:
            raise RequestError(
                "clean needs a target",
                "it removes omgoptim's files on another machine",
                f"give {argument('target', 'ssh://user@host')}",
            )
        return self
