"""Request of `prune`, and one params class per technique."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from omgoptim.requests.base import RARE, Params, Runtime, Short, bare_name, before_over_after
from omgoptim.requests.training import ExecutionFields, RecoveryRequest


class Structured(Params):
    """Remove whole channels, attention heads and hidden units; tensors get smaller and faster on every engine.

    Example:
        >>> import omgoptim
        >>> omgoptim.Structured(target_speedup=2.0).model_dump(exclude_defaults=True)
        {'target_speedup': 2.0}
    """

    method: Literal["structured"] = "structured"
    pruning_ratio: Annotated[float | None, Short("Of channels, 0..1; default 0.3.")] = Field(None, gt=0, lt=1)
    """Fraction of channels to remove, 0..1 (default 0.3); parameters and MACs fall by more."""
    target_speedup: Annotated[
        float | None, BeforeValidator(before_over_after), Short("Alternative target, measured here.")
    ] = Field(None, gt=1, le=100)
    """Alternative target: speedup (before / after) of the whole model, measured on this machine."""
    target_latency_ms: Annotated[float | None, Short("Alternative target: latency in ms.")] = Field(None, gt=0)
    """Alternative target: latency in ms at batch 1, measured on this machine."""
    target_macs_ratio: Annotated[
        float | None, BeforeValidator(before_over_after), Short("Alternative target: MACs before / after.")
    ] = Field(None, gt=1, le=1000)
    """Alternative target: reduction of multiply-accumulates (before / after)."""
    importance: Annotated[Literal["magnitude", "taylor", "bn_scale", "lamp", "fpgm", "hessian", "random"], RARE] = (
        "magnitude"
    )
    """Importance criterion of channels; taylor and hessian need data."""
    ranking: Annotated[Literal["uniform", "global", "isomorphic"], RARE] = "uniform"
    """Same ratio in every group (uniform), one ranking of all channels (global), one per type of group (isomorphic)."""
    round_to: Annotated[int | None, RARE] = Field(None, ge=1, le=1024)
    """Round widths to multiples of this; default: 8 if wide enough; for a speed target, from the latency table."""
    max_layer_ratio: Annotated[float, RARE] = Field(0.9, gt=0, lt=1)
    """Largest fraction removed from one group."""
    reconstruct: Annotated[bool, RARE] = True
    """Refit the remaining weights to each layer's original output by least squares; needs no labels."""
    prune_heads: Annotated[bool, RARE] = True
    """Allow removal of attention heads."""
    targets: list[str] = []
    """Globs on module paths: prune only these."""
    ignore: list[str] = []
    """Globs on module paths: do not prune these."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = ("pruning_ratio", "target_speedup", "target_latency_ms", "target_macs_ratio")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        return self

    @property
    def goal(self) -> float:
        """Return the ratio of channels to remove, where that is the target."""
        return 0.3 if self.pruning_ratio is None else self.pruning_ratio


class Unstructured(Params):
    """Common parameters of unstructured pruning methods."""

    sparsity: Annotated[float, Short("Final, 0..1.")] = Field(0.5, gt=0, lt=1)
    """Final sparsity: fraction of the selected weights that are zero, 0..1."""
    reconstruct: Annotated[bool, RARE] = True
    """Refit the remaining weights to each layer's original output by least squares; needs no labels."""
    targets: list[str] = []
    """Globs on module paths: prune only these."""
    ignore: list[str] = []
    """Globs on module paths: do not prune these."""


class Magnitude(Unstructured):
    """Zero the weights with the smallest magnitude.

    Example:
        >>> import omgoptim
        >>> omgoptim.Magnitude(sparsity=0.9, scope="per_layer").model_dump(exclude_defaults=True)
        {'sparsity': 0.9, 'scope': 'per_layer'}
    """

    method: Literal["magnitude"] = "magnitude"
    scope: Annotated[Literal["global", "per_layer"], RARE] = "global"
    """Rank weights over all selected layers, or within each layer."""
    layer_ratios: Annotated[Literal["uniform", "erdos_renyi", "lamp"], RARE] = "uniform"
    """Sparsity allocation over layers: plain ranking (uniform), Erdos-Renyi by layer shape, or LAMP scores."""


class Random(Unstructured):
    """Zero random weights: the baseline for the other methods.

    Example:
        >>> import omgoptim
        >>> omgoptim.Random(sparsity=0.9).model_dump(exclude_defaults=True)
        {'sparsity': 0.9}
    """

    method: Literal["random"] = "random"
    scope: Annotated[Literal["global", "per_layer"], RARE] = "global"
    """Rank weights over all selected layers, or within each layer."""
    layer_ratios: Annotated[Literal["uniform", "erdos_renyi"], RARE] = "uniform"
    """Sparsity allocation over layers: uniform, or Erdos-Renyi by layer shape."""


class Wanda(Unstructured):
    """Zero the weights with the smallest magnitude times input norm (Wanda); needs data, no labels.

    Example:
        >>> import omgoptim
        >>> omgoptim.Wanda(sparsity=0.6).model_dump(exclude_defaults=True)
        {'sparsity': 0.6}
    """

    method: Literal["wanda"] = "wanda"
    scope: Annotated[Literal["per_row", "per_layer", "global"], RARE] = "per_row"
    """Rank weights within each output row, within each layer, or over all layers."""


class Gradient(Unstructured):
    """Zero the weights whose removal changes the loss least (first-order saliency); needs data.

    Example:
        >>> import omgoptim
        >>> omgoptim.Gradient(score="movement").model_dump(exclude_defaults=True)
        {'score': 'movement'}
    """

    method: Literal["gradient"] = "gradient"
    score: Annotated[Literal["sensitivity", "movement"], RARE] = "sensitivity"
    """Saliency. sensitivity: |weight x gradient|; movement: -weight x gradient, summed over steps."""
    scope: Annotated[Literal["global", "per_layer"], RARE] = "global"
    """Rank weights over all selected layers, or within each layer."""


class SemiStructured(Params):
    """N:M sparsity: keep n of every m neighbouring weights, the pattern that some GPUs accelerate.

    Example:
        >>> import omgoptim
        >>> omgoptim.SemiStructured(pattern="4:8").model_dump(exclude_defaults=True)
        {'pattern': '4:8'}
    """

    method: Literal["semi_structured"] = "semi_structured"
    pattern: Annotated[str, RARE] = "2:4"
    """n:m, n weights kept of every m along the input dimension."""
    score: Annotated[Literal["magnitude", "wanda"], RARE] = "magnitude"
    """Saliency of weights; wanda needs data."""
    reconstruct: Annotated[bool, RARE] = True
    """Refit the remaining weights to each layer's original output by least squares; needs no labels."""
    targets: list[str] = []
    """Globs on module paths: prune only these."""
    ignore: list[str] = []
    """Globs on module paths: do not prune these."""

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, pattern: str) -> str:
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        if not found or not 0 < int(found[1]) < int(found[2]) <= 64:
            raise ValueError(f"pattern '{pattern}' is not n:m with 0 < n < m <= 64, such as 2:4")
        return pattern

    @property
    def kept(self) -> tuple[int, int]:
        """The numbers n and m of the pattern."""
        n, m = self.pattern.split(":")
        return int(n), int(m)


Method = Annotated[
    Structured | Magnitude | Wanda | Gradient | SemiStructured | Random,
    Field(discriminator="method"),
    BeforeValidator(bare_name("method")),
]

SHAPES = ("one_shot", "linear", "cubic")


class PruneRequest(ExecutionFields, RecoveryRequest):
    """Prune a model, fine-tune it, and measure the saved artifact against the original.

    Structured pruning makes a model smaller and faster; unstructured sparsity makes the file smaller, but dense
    engines no faster. Runs code with the user's rights.
    """

    workers: Annotated[int, RARE] = Field(1, ge=1, le=1000)
    """Parallel workers for the layers of a sensitivity analysis; everything else runs in sequence."""
    method: Annotated[
        Method,
        Short(
            "structured removes channels and heads, the others zero single weights. wanda, gradient: need data. "
            "semi_structured: n:m. random: baseline."
        ),
    ] = Structured()
    """Pruning method: a name, or an object with its parameters."""
    schedule: Annotated[str, Short("one_shot, linear, cubic, or amounts: 0.5,0.75,0.9")] = "cubic"
    """Pruning schedule over the rounds: one_shot, linear, cubic, or a list of amounts: 0.5,0.75,0.9."""
    rounds: Annotated[int, Short("")] = Field(1, ge=1, le=100)
    """Pruning rounds, each followed by `epochs` of fine-tuning."""
    sensitivity: Annotated[bool, Short("Quality against the amount, per layer.")] = False
    """Sensitivity analysis: quality against the amount pruned from one layer or group alone; takes longer."""
    runtime: Runtime = "auto"
    """Engine that runs the artifact; both models are measured on it. auto: torch_eager for a module."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """Quality guard: largest allowed drop of the metric, before minus after."""
    output: str | None = None
    """New folder for a copy of the artifact; must not exist yet."""
    plan: bool = False
    """Dry run: print what would be removed from which layers, change nothing."""

    @model_validator(mode="after")
    def _schedule_reaches_the_goal(self) -> Self:
        amounts = self.amounts
        if amounts is None:
            if self.schedule not in SHAPES:
                raise ValueError(
                    f"schedule '{self.schedule}' is not one of {', '.join(SHAPES)}, nor a list: 0.5,0.75,0.9"
                )
            return self
        if any(not 0 < amount < 1 for amount in amounts) or sorted(set(amounts)) != amounts:
            raise ValueError(f"the amounts of schedule '{self.schedule}' must grow, each between 0 and 1")
        goal = self.goal
        if goal is None:
            raise ValueError(
                f"schedule '{self.schedule}' lists amounts, and method {self.method.method} is not given one; "
                "use schedule one_shot, linear or cubic"
            )
        if abs(amounts[-1] - goal) > 1e-9:
            raise ValueError(f"schedule '{self.schedule}' ends at {amounts[-1]:g}, and the goal is {goal:g}")
        return self

    @property
    def amounts(self) -> list[float] | None:
        """Return the amounts that the schedule lists itself, or None where it names a shape."""
        if not re.fullmatch(r"\d*\.?\d+(\s*,\s*\d*\.?\d+)*", self.schedule):
            return None
        return [float(amount) for amount in self.schedule.split(",")]

    @property
    def goal(self) -> float | None:
        """Return the amount that the last round reaches, 0..1; None with another target: a pattern, a speed."""
        method = self.method
        if isinstance(method, SemiStructured):
            return None
        if isinstance(method, Structured):
            by_ratio = method.target_speedup is None and method.target_latency_ms is None
            return method.goal if by_ratio and method.target_macs_ratio is None else None
        return method.sparsity
