"""Request of `profile`."""

from __future__ import annotations

from typing import Annotated

from omgoptim.requests.base import AnyRuntime, ModelRequest
from omgoptim.requests.listing import Short


class ProfileRequest(ModelRequest):
    """Measure a model: size, parameters, MACs, latency, throughput, peak memory, quality and cost per layer.

    Start here; changes nothing. Runs code with the user's rights.
    """

    runtime: Annotated[
        AnyRuntime, Short("Engine. auto: the model's own for profile, the fastest for quantize, else torch_eager.")
    ] = "auto"
    """Engine to measure on; auto: that of the model (torch_eager for a module)."""
