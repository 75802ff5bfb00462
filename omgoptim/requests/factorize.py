"""What may be asked of `factorize`: the request, and one params class per technique."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from omgoptim.requests.bare_name import bare_name
from omgoptim.requests.base import Params, Runtime
from omgoptim.requests.ratios import before_over_after
from omgoptim.requests.training import RecoveryRequest


class Factorization(Params):
    """What the techniques that write a weight as a product of two smaller ones share."""

    target_compression: Annotated[float | None, BeforeValidator(before_over_after)] = Field(None, gt=1, le=1000)
    """Parameters of the whole model, before over after (default 2); ranks are shared out by what each layer loses."""
    energy: float | None = Field(None, gt=0, le=1)
    """Instead: the smallest rank of each layer that keeps this fraction of its output's (or weight's) energy."""
    rank: int | None = Field(None, ge=1)
    """Instead: one rank for all layers."""
    rank_ratio: float | None = Field(None, gt=0, lt=1)
    """Instead: parameters kept of each factorized layer, 0..1."""
    per: Literal["bytes", "time"] = "bytes"
    """What the shared-out ranks save: bytes, or time as measured on this machine."""
    convolution: Literal["auto", "tucker2", "spatial", "skip"] = "auto"
    """Form of convolutions: 1x1, kxk, 1x1 (tucker2); kx1, 1xk (spatial); the one that loses less (auto)."""
    round_to: int = Field(1, ge=1, le=256)
    """Keep ranks at multiples of this."""
    targets: list[str] = []
    """Globs on module paths: factorize only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these as they are."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        given = [n for n in ("target_compression", "energy", "rank", "rank_ratio") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two goals; give one")
        if self.per == "time" and given and given != ["target_compression"]:
            raise ValueError(f"per time shares out a target_compression; {given[0]} leaves nothing to share")
        return self

    @property
    def compression(self) -> float | None:
        """Parameters before over after to reach, where that is the goal."""
        by_layer = self.energy is not None or self.rank is not None or self.rank_ratio is not None
        return None if by_layer else self.target_compression or 2.0


class Whitened(Factorization):
    """Low-rank products that lose least of a layer's output on data (SVD of the whitened weight, as SVD-LLM)."""

    method: Literal["whitened"] = "whitened"
    calibration_samples: int = Field(256, ge=1)
    """Samples that the second moments of the inputs are read from."""


class Svd(Factorization):
    """Low-rank products that lose least of the weight itself (plain SVD); needs no data, and loses more."""

    method: Literal["svd"] = "svd"


FactorMethod = Annotated[Whitened | Svd, Field(discriminator="method"), BeforeValidator(bare_name("method"))]


class FactorizeRequest(RecoveryRequest):
    """Write large weights as products of two thin ones, train back what that costs, and measure the saved artifact.

    For models with large Linear layers or convolutions. Runs user code with the user's rights.
    """

    method: FactorMethod = Whitened()
    """One technique: its name, or an object with its parameters."""
    sensitivity: bool = False
    """Measure how quality falls with the rank of each layer alone; takes longer."""
    runtime: Runtime = "auto"
    """Engine of the artifact, on which both models are measured; auto is torch_eager for a module."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """The guard: most quality that may be lost, before minus after."""
    output: str | None = None
    """Folder to put a copy of the artifact in; must not exist yet."""
    plan: bool = False
    """Say which layers would be factorized, at which ranks, and do nothing."""
