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
    """Make a model as small and fast as possible within a quality drop and a time budget.

    Quantizes first, then prunes or distills as far as the guard allows, quantizes that, and measures the best against
    the original. Never worse than quantization alone. Runs code with the user's rights.
    """

    workers: Annotated[int, RARE] = Field(1, ge=1, le=1000)
    """Parallel workers for the two compared trainings (pruning, distillation); other steps run in sequence."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """Quality guard: largest allowed drop of the metric, before minus after."""
    target_latency_ms: float | None = Field(None, gt=0)
    """Target: latency of one call at batch 1 on this machine, in milliseconds."""
    target_size_mb: Annotated[float | None, Short("Target on disk.")] = Field(None, gt=0)
    """Target: size on disk, in MB (1,000,000 bytes)."""
    target_memory_mb: Annotated[float | None, Short("Target: peak memory.")] = Field(None, gt=0)
    """Target: peak memory of a process that runs the model, in MB."""
    budget_minutes: Annotated[float, Short("Time limit; it trains.")] = Field(30.0, gt=0, le=10_080)
    """Time limit of the whole run, in minutes."""
    prefer: Annotated[Prefer, RARE] = "balanced"
    """Choice among results that reach the targets: speedup x size ratio (balanced; no slower than quantization alone), speed or size."""  # noqa: E501
    runtime: Runtime = "auto"
    """Engine of the result; auto tries those that are installed."""
    loss: Annotated[str, RARE] = "auto"
    """auto (cross-entropy, mean squared error, or the model's own loss), or file.py:callable = loss(outputs, targets)."""  # noqa: E501
    learning_rate: Annotated[float | None, RARE] = Field(None, gt=0)
    """Peak learning rate of training; default: depends on the optimizer."""
    output: str | None = None
    """New folder for a copy of the artifact; must not exist yet."""
    plan: bool = False
    """Dry run: print the steps, their expected times, and targets that cannot be reached."""


class SearchRequest(ExecutionFields, TrainingRequest):
    """Search for the architecture with the best quality that meets a target; trains many networks."""

    space: Annotated[
        str | None, Short("auto: vary the model; file.py:callable = space(trial). Default: model is that.")
    ] = None
    """Search space: auto (variants of the model's stages), or file.py:callable = space(trial) that returns a module, with the model as teacher; default: the model argument is such a callable."""  # noqa: E501
    target_latency_ms: float | None = Field(None, gt=0)
    """Target: latency of one call at batch 1 on this machine, in milliseconds."""
    target_speedup: float | None = Field(None, gt=0, le=1000)
    """Target: latency of the original / that of the result."""
    target_size_mb: Annotated[float | None, Short("Target on disk.")] = Field(None, gt=0)
    """Target: size on disk, in MB (1,000,000 bytes)."""
    target_memory_mb: Annotated[float | None, Short("Peak memory.")] = Field(None, gt=0)
    """Target: peak memory of a process that runs the model, in MB."""
    trials: Annotated[int, Short("")] = Field(40, ge=1, le=1000)
    """Number of networks to train; those that miss a target before training do not count."""
    epochs: int | None = Field(None, ge=1, le=10_000)
    """Epochs of a training to the end; trials stop at 1/9 and 1/3 of them unless among the best third. Default: 9."""
    budget_minutes: float | None = Field(None, gt=0, le=10_080)
    """Time limit, in minutes: no trial starts after it, less the time for the final trainings; default: none."""
    proposals: Annotated[int | None, RARE] = Field(None, ge=1, le=1000)
    """Trials in flight: each is proposed without the results of the others; default: 1, or 3 per worker."""
    control: Literal["none", "random"] = "none"
    """random: also run as many random trials with the same rejection and halving, and report both."""
    precision: Annotated[Literal["float32", "int8"], RARE] = "float32"
    """Precision in which networks are measured and saved; int8: static quantization of each."""
    stages: Annotated[int, RARE] = Field(10, ge=1, le=12)
    """Maximum number of stages that space auto divides the model into."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """Quality guard: largest allowed drop of the metric, before minus after."""
    runtime: Runtime = "auto"
    """Engine of the result; auto: onnxruntime where the model can be exported."""
    output: str | None = None
    """New folder for a copy of the artifact; must not exist yet."""
    plan: bool = False
    """Dry run: print the search space, and targets that cannot be reached."""

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        targets = (self.target_latency_ms, self.target_speedup, self.target_size_mb, self.target_memory_mb)
        if all(target is None for target in targets):
            raise RequestError(
                "a search needs a target",
                "without one the largest network would always be the best",
                f"give one, such as {argument('target_latency_ms', 4)} or {argument('target_speedup', 2)}",
            )
        return self

    @property
    def in_flight(self) -> int:
        """Trials that are proposed before the first of them has ended.

        Trainings differ in length, and results are used in the order of the proposals: with few trials in flight, a
        long one lets other workers wait.
        """
        return self.proposals or (1 if self.workers == 1 and self.on == "local" else 3 * self.workers)

    @property
    def whole_epochs(self) -> int:
        """Return the epochs of a complete training."""
        return self.epochs or 9
