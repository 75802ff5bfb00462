"""What may be asked about runs and about the set-up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from omgoptim.requests.base import Request


class RunsRequest(Request):
    """List runs; show, wait for, cancel or resume one; pick another result of one."""

    action: Literal["list", "show", "wait", "cancel", "resume", "pick"] = "list"
    """resume: start a run that failed or was cancelled again, from its last checkpoint. pick: deliver another of its
    finalists, without computing again."""
    run_id: str | None = None
    """The run to show, wait for, cancel, resume or pick from."""
    name: str | None = None
    """For pick: which of the report's alternatives."""
    project: str | None = None
    """Absolute path of the user's project."""

    @model_validator(mode="after")
    def _run_id_where_needed(self) -> Self:
        if self.action != "list" and not self.run_id:
            raise ValueError(f"action '{self.action}' needs run_id; action 'list' shows the ids")
        if self.action == "pick" and not self.name:
            raise ValueError("action 'pick' needs name; action 'show' shows the alternatives")
        return self


class DoctorRequest(Request):
    """Start the project's Python: say which engines, devices and extras it has, what to install for the rest."""

    project: str | None = None
    """Absolute path of the user's project."""
    python: str | None = Field(None)
    """Python to look at; default: the project's .venv, else the active environment."""
