"""What may be asked of `prune`: the request, and one params class per technique."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from omgoptim.requests.bare_name import bare_name
from omgoptim.requests.base import Params, Runtime
from omgoptim.requests.ratios import before_over_after
from omgoptim.requests.training import RecoveryRequest


class Structured(Params):
    """Remove whole channels, heads and hidden units, so that tensors get smaller and every engine gets faster."""

    method: Literal["structured"] = "structured"
    pruning_ratio: float | None = Field(None, gt=0, lt=1)
    """Fraction of the channels to remove, 0..1 (default 0.3); parameters and MACs fall by more."""
    target_speedup: Annotated[float | None, BeforeValidator(before_over_after)] = Field(None, gt=1, le=100)
    """Instead of a ratio: remove until the whole model is measured to be so many times faster on this machine."""
    target_latency_ms: float | None = Field(None, gt=0)
    """Instead of a ratio: remove until one call at batch 1 takes so many milliseconds on this machine."""
    target_macs_ratio: Annotated[float | None, BeforeValidator(before_over_after)] = Field(None, gt=1, le=1000)
    """Instead of a ratio: remove until the multiply-accumulates are so many times fewer (before / after)."""
    importance: Literal["magnitude", "taylor", "bn_scale", "lamp", "fpgm", "hessian", "random"] = "magnitude"
    """What says which channels matter least; taylor and hessian need data."""
    ranking: Literal["uniform", "global", "isomorphic"] = "uniform"
    """The same ratio in every group, one ranking of all channels, or one per kind of group."""
    round_to: int | None = Field(None, ge=1, le=1024)
    """Keep widths at multiples of this; default: 8 where wide enough, and for a speed what was measured here."""
    max_layer_ratio: float = Field(0.9, gt=0, lt=1)
    """Most that is removed from one group."""
    reconstruct: bool = True
    """Fit the weights that stay to the layers' outputs before, on training inputs without labels."""
    prune_heads: bool = True
    """Whether attention heads may be removed; else only their neighbours."""
    targets: list[str] = []
    """Globs on module paths: prune only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these whole."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = ("pruning_ratio", "target_speedup", "target_latency_ms", "target_macs_ratio")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two goals; give one")
        return self

    @property
    def goal(self) -> float:
        """The ratio of channels to remove, where that is the goal."""
        return 0.3 if self.pruning_ratio is None else self.pruning_ratio


class Unstructured(Params):
    """What the techniques that zero single weights share."""

    sparsity: float = Field(0.5, gt=0, lt=1)
    """Fraction of the selected weights that are zero at the end, 0..1."""
    reconstruct: bool = True
    """Fit the weights that stay to the layers' outputs before, on training inputs without labels."""
    targets: list[str] = []
    """Globs on module paths: prune only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these whole."""


class Magnitude(Unstructured):
    """Zero the weights of smallest magnitude."""

    method: Literal["magnitude"] = "magnitude"
    scope: Literal["global", "per_layer"] = "global"
    """Rank all selected weights together, or those of each layer alone."""
    layer_ratios: Literal["uniform", "erdos_renyi", "lamp"] = "uniform"
    """How sparsity is shared among layers: by plain rank (uniform), by layer shape, or by LAMP scores."""


class Random(Unstructured):
    """Zero weights drawn at random: the control that any other method has to beat."""

    method: Literal["random"] = "random"
    scope: Literal["global", "per_layer"] = "global"
    """Rank all selected weights together, or those of each layer alone."""
    layer_ratios: Literal["uniform", "erdos_renyi"] = "uniform"
    """How sparsity is shared among layers: evenly, or by layer shape."""


class Wanda(Unstructured):
    """Zero the weights whose magnitude times the norm of their input is smallest (Wanda); needs data, no labels."""

    method: Literal["wanda"] = "wanda"
    scope: Literal["per_row", "per_layer", "global"] = "per_row"
    """Rank the weights of each output row, of each layer, or all together."""


class Gradient(Unstructured):
    """Zero the weights whose loss would change least; needs data."""

    method: Literal["gradient"] = "gradient"
    score: Literal["sensitivity", "movement"] = "sensitivity"
    """sensitivity: |weight x gradient|; movement: -weight x gradient summed over steps."""
    scope: Literal["global", "per_layer"] = "global"
    """Rank all selected weights together, or those of each layer alone."""


class SemiStructured(Params):
    """Keep n of every m neighbouring weights: the pattern that some GPUs run faster."""

    method: Literal["semi_structured"] = "semi_structured"
    pattern: str = "2:4"
    """n:m, n weights kept of every m along a weight's inputs."""
    score: Literal["magnitude", "wanda"] = "magnitude"
    """What says which weights matter least; wanda needs data."""
    reconstruct: bool = True
    """Fit the weights that stay to the layers' outputs before, on training inputs without labels."""
    targets: list[str] = []
    """Globs on module paths: prune only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these whole."""

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, pattern: str) -> str:
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        if not found or not 0 < int(found[1]) < int(found[2]) <= 64:
            raise ValueError(f"pattern '{pattern}' is not n:m with 0 < n < m <= 64, such as 2:4")
        return pattern

    @property
    def kept(self) -> tuple[int, int]:
        """n and m."""
        n, m = self.pattern.split(":")
        return int(n), int(m)


Method = Annotated[
    Structured | Magnitude | Wanda | Gradient | SemiStructured | Random,
    Field(discriminator="method"),
    BeforeValidator(bare_name("method")),
]

SHAPES = ("one_shot", "linear", "cubic")


class PruneRequest(RecoveryRequest):
    """Remove weights from a model, bring it back by training, and measure the saved artifact against the original.

    Structured pruning makes a model smaller and faster; zeroed single weights make the file smaller, and no dense
    engine faster. Runs user code with the user's rights.
    """

    method: Method = Structured()
    """One technique: its name, or an object with its parameters."""
    schedule: str = "cubic"
    """How the amount grows over the rounds: one_shot, linear, cubic, or the amounts themselves: 0.5,0.75,0.9."""
    rounds: int = Field(1, ge=1, le=100)
    """Rounds of pruning, each followed by `epochs` of training."""
    sensitivity: bool = False
    """Measure how quality falls with the amount removed from each layer or group alone; takes longer."""
    runtime: Runtime = "auto"
    """Engine of the artifact, on which both models are measured; auto is torch_eager for a module."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """The guard: most quality that may be lost, before minus after."""
    output: str | None = None
    """Folder to put a copy of the artifact in; must not exist yet."""
    plan: bool = False
    """Say what would be removed, from which layers and at what cost, and do nothing."""

    @model_validator(mode="after")
    def _schedule_reaches_the_goal(self) -> Self:
        amounts = self.amounts
        if amounts is None:
            if self.schedule not in SHAPES:
                raise ValueError(
                    f"schedule '{self.schedule}' is none of {', '.join(SHAPES)}, nor a list of amounts: 0.5,0.75,0.9"
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
        """The amounts that the schedule lists itself, or None where it names a shape."""
        if not re.fullmatch(r"\d*\.?\d+(\s*,\s*\d*\.?\d+)*", self.schedule):
            return None
        return [float(amount) for amount in self.schedule.split(",")]

    @property
    def goal(self) -> float | None:
        """The amount that the last round reaches, 0..1; None where the goal is none: a pattern, a speed."""
        method = self.method
        if isinstance(method, SemiStructured):
            return None
        if isinstance(method, Structured):
            by_ratio = method.target_speedup is None and method.target_latency_ms is None
            return method.goal if by_ratio and method.target_macs_ratio is None else None
        return method.sparsity
