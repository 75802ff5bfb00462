"""What may be asked of `profile`."""

from __future__ import annotations

from omgoptim.requests.base import ModelRequest, Runtime


class ProfileRequest(ModelRequest):
    """Measure a model as it is: size, parameters, MACs, latency, throughput, memory, quality and the costliest layers.

    Start here. Changes nothing. Runs user code with the user's rights.
    """

    runtime: Runtime = "auto"
    """Engine to measure on; auto is the one the model comes with (torch_eager for a module)."""
