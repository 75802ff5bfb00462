"""What may be asked of `profile`."""

from __future__ import annotations

from omgoptim.requests.base import ModelRequest, Runtime


class ProfileRequest(ModelRequest):
    """Measure a model: size, parameters, MACs, latency, throughput, peak memory, quality and cost per layer.

    Start here; changes nothing. Runs code with the user's rights.
    """

    runtime: Runtime = "auto"
    """Engine to measure on; auto: that of the model (torch_eager for a module)."""
