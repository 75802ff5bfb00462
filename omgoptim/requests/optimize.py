"""Request of `optimize`: a goal and a time budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from omgoptim.requests.base import ModelRequest, Runtime
from omgoptim.requests.execution import ExecutionFields
from omgoptim.requests.listing import RARE, Short
from omgoptim.requests.quantize import Prefer


class OptimizeRequest(ExecutionFields, ModelRequest):
    """Make a model as small and fast as it gets within a quality drop and a time budget.

    Quantizes first, then prunes or distills as far as the guard allows, quantizes that, and measures the best against
    the original. Never worse than quantization alone. Runs code with the user's rights.
    """

    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """The guard: most quality that may be lost, before minus after."""
    target_latency_ms: float | None = Field(None, gt=0)
    """Latency of one call at batch 1 to reach on this machine, in milliseconds."""
    target_size_mb: Annotated[float | None, Short("To reach on disk.")] = Field(None, gt=0)
    """Size on disk to reach, in MB (1,000,000 bytes)."""
    target_memory_mb: Annotated[float | None, Short("Peak memory to reach.")] = Field(None, gt=0)
    """Peak memory of a process that runs the model to reach, in MB."""
    budget_minutes: Annotated[float, Short("Longest minutes in all; it trains.")] = Field(30.0, gt=0, le=10_080)
    """Longest minutes that the whole run should take."""
    prefer: Annotated[Prefer, RARE] = "balanced"
    """Best among what reaches the goal: speedup x size ratio (balanced; no slower than quantization alone), speed or size."""  # noqa: E501
    runtime: Runtime = "auto"
    """Engine of the result; auto tries those that are installed."""
    loss: Annotated[str, RARE] = "auto"
    """auto (cross-entropy, mean squared error, or the model's own loss), or file.py:callable = loss(outputs, targets)."""  # noqa: E501
    learning_rate: Annotated[float | None, RARE] = Field(None, gt=0)
    """Peak learning rate of training; default: what suits the optimizer."""
    output: str | None = None
    """Folder to put a copy of the artifact in; must not exist yet."""
    plan: bool = False
    """Say which steps would be taken, what they would cost, and what cannot be reached; and do nothing."""
