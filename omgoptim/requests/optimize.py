"""Requests with a goal: optimize a model in a chain of steps, search for an architecture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from omgoptim.errors import RequestError, argument
from omgoptim.requests.base import RARE, ModelRequest, Runtime, Short
from omgoptim.requests.quantize import Prefer
from omgoptim.requests.training import ExecutionFields, TrainingRequest


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


class SearchRequest(ExecutionFields, TrainingRequest):
    """Search for the architecture of best quality that meets a target; trains many networks."""

    space: Annotated[
        str | None, Short("auto: vary the model; file.py:callable = space(trial). Default: model is that.")
    ] = None
    """auto (the model's own stages are varied) or file.py:callable = space(trial) that returns a module, with the model as teacher; default: the model is such a callable."""  # noqa: E501
    target_latency_ms: float | None = Field(None, gt=0)
    """Latency of one call at batch 1 to reach on this machine, in milliseconds."""
    target_speedup: float | None = Field(None, gt=0, le=1000)
    """Latency of the original over that of the result to reach."""
    target_size_mb: Annotated[float | None, Short("To reach on disk.")] = Field(None, gt=0)
    """Size on disk to reach, in MB (1,000,000 bytes)."""
    target_memory_mb: Annotated[float | None, Short("Peak memory.")] = Field(None, gt=0)
    """Peak memory of a process that runs the model to reach, in MB."""
    trials: Annotated[int, Short("")] = Field(40, ge=1, le=1000)
    """Networks to train; those that miss a target before training do not count."""
    epochs: int | None = Field(None, ge=1, le=10_000)
    """Epochs of a training to the end; trials stop at 1/9 and 1/3 of them unless among the best third. Default: 9."""
    budget_minutes: float | None = Field(None, gt=0, le=10_080)
    """Minutes after which no trial begins, less the share of the final trainings; default: no limit."""
    proposals: Annotated[int | None, RARE] = Field(None, ge=1, le=1000)
    """Trials in flight: each is proposed without the results of the others; default: 1, or one more than workers."""
    control: Literal["none", "random"] = "none"
    """random: also run as many random trials with the same rejection and halving, and report both."""
    precision: Annotated[Literal["float32", "int8"], RARE] = "float32"
    """Precision in which networks are measured and delivered; int8: static quantization of each."""
    stages: Annotated[int, RARE] = Field(10, ge=1, le=12)
    """Most parts that space auto divides the model into."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """The guard: most quality that may be lost, before minus after."""
    runtime: Runtime = "auto"
    """Engine of the result; auto: onnxruntime where the model can be exported."""
    output: str | None = None
    """Folder to put a copy of the artifact in; must not exist yet."""
    plan: bool = False
    """Say what would be searched and what cannot be reached; and do nothing."""

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        targets = (self.target_latency_ms, self.target_speedup, self.target_size_mb, self.target_memory_mb)
        if all(target is None for target in targets):
            raise RequestError(
                "a search needs a target",
                "without one the largest network is the best",
                f"give {argument('target_latency_ms', 4)}, target_speedup, target_size_mb or target_memory_mb",
            )
        return self

    @property
    def in_flight(self) -> int:
        """Trials that are proposed before the first of them has ended."""
        return self.proposals or (1 if self.workers == 1 and self.on == "local" else self.workers + 1)

    @property
    def whole_epochs(self) -> int:
        """Return the epochs of a complete training."""
        return self.epochs or 9
