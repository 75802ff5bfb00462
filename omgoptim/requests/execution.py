"""Where the independent work of a verb runs: processes of this machine, a Ray cluster, or a Ray job."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from omgoptim.errors import RequestError, argument
from omgoptim.requests.base import Request
from omgoptim.requests.listing import RARE


class ExecutionFields(Request):
    """Where work runs, and how much of it at a time."""

    on: Annotated[str, RARE] = "local"
    """Where the work runs: local (this machine), ray (a Ray of its own, or the cluster of RAY_ADDRESS), or http://HEAD:8265 (the whole run as a Ray job there)."""  # noqa: E501
    workers: Annotated[int, RARE] = Field(1, ge=1, le=1000)
    """Tasks that run at a time; with ray, each has one CPU."""

    @field_validator("on")
    @classmethod
    def _is_a_place(cls, on: str) -> str:
        refuse_ray_client(on, argument("on", on))
        if on not in ("local", "ray") and not is_head(on):
            raise RequestError(
                f"'{on}' is not a place to run on",
                "it is local, ray, or the address of a Ray head",
                f"give {argument('on', 'ray')} or {argument('on', 'http://head:8265')}",
            )
        return on


def is_head(on: str) -> bool:
    """Whether a place is the address of a head that takes Ray jobs."""
    return re.fullmatch(r"https?://[^\s/@?#]+/?", on) is not None


def refuse_ray_client(address: str, given: str) -> None:
    """Refuse the Ray Client.

    Raises:
        RequestError: the address begins with ray://.
    """
    if address.startswith("ray://"):
        host = re.sub(r"[:/].*", "", address.removeprefix("ray://")) or "head"
        raise RequestError(
            f"{given}: omgoptim does not use the Ray Client",
            "Ray advises against it for machine learning, and a lost connection ends the run",
            f"submit the run as a Ray job: {argument('on', f'http://{host}:8265')}",
        )
