"""Request of `factorize`, and one params class per technique."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from omgoptim.requests.base import RARE, Params, Runtime, Short, bare_name, before_over_after
from omgoptim.requests.training import ExecutionFields, RecoveryRequest


class Factorization(Params):
    """Common parameters of the low-rank methods."""

    target_compression: Annotated[
        float | None, BeforeValidator(before_over_after), Short("Parameters before / after; default 2, distill: 4.")
    ] = Field(None, gt=1, le=1000)
    """Target: parameters of the whole model, before / after (default 2); ranks are allocated by each layer's error."""
    energy: Annotated[float | None, RARE] = Field(None, gt=0, le=1)
    """Alternative target: fraction of each layer's output (or weight) energy to keep, 0..1."""
    rank: Annotated[int | None, RARE] = Field(None, ge=1)
    """Alternative target: one rank for all layers."""
    rank_ratio: Annotated[float | None, Short("Alternative target, 0..1, per layer.")] = Field(None, gt=0, lt=1)
    """Alternative target: fraction of parameters kept in each factorized layer, 0..1."""
    per: Annotated[Literal["bytes", "time"], RARE] = "bytes"
    """Cost that rank allocation minimizes: bytes, or time measured on this machine."""
    convolution: Annotated[Literal["auto", "tucker2", "spatial", "skip"], RARE] = "auto"
    """Factorization of convolutions: 1x1, kxk, 1x1 (tucker2); kx1, 1xk (spatial); the one with the smaller error (auto); none (skip)."""  # noqa: E501
    round_to: Annotated[int, RARE] = Field(1, ge=1, le=256)
    """Round ranks to multiples of this."""
    targets: list[str] = []
    """Globs on module paths: factorize only these."""
    ignore: list[str] = []
    """Globs on module paths: do not change these."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        given = [n for n in ("target_compression", "energy", "rank", "rank_ratio") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        if self.per == "time" and given and given != ["target_compression"]:
            raise ValueError(f"per time allocates the ranks of a target_compression; {given[0]} already sets them")
        return self

    @property
    def compression(self) -> float | None:
        """Return the compression target, parameters before over after, where that is the target."""
        by_layer = self.energy is not None or self.rank is not None or self.rank_ratio is not None
        return None if by_layer else self.target_compression or 2.0


class Whitened(Factorization):
    """SVD of the whitened weight (SVD-LLM): smallest error of the layer's output on calibration data.

    Example:
        >>> import omgoptim
        >>> omgoptim.Whitened(target_compression=2.5).model_dump(exclude_defaults=True)
        {'target_compression': 2.5}
    """

    method: Literal["whitened"] = "whitened"
    calibration_samples: Annotated[int, RARE] = Field(256, ge=1)
    """Samples for the input covariance."""


class Svd(Factorization):
    """Plain SVD of the weight; needs no data, larger error.

    Example:
        >>> import omgoptim
        >>> omgoptim.Svd(rank_ratio=0.5).model_dump(exclude_defaults=True)
        {'rank_ratio': 0.5}
    """

    method: Literal["svd"] = "svd"


FactorMethod = Annotated[Whitened | Svd, Field(discriminator="method"), BeforeValidator(bare_name("method"))]


class FactorizeRequest(ExecutionFields, RecoveryRequest):
    """Low-rank factorization: replace large weights by two low-rank factors, fine-tune, measure the artifact.

    For models with large Linear layers or convolutions. Runs code with the user's rights.
    """

    workers: Annotated[int, RARE] = Field(1, ge=1, le=1000)
    """Parallel workers for the layers of a sensitivity analysis; everything else runs in sequence."""
    method: Annotated[FactorMethod, Short("whitened: needs data, smaller error; svd: needs none.")] = Whitened()
    """Factorization method: a name, or an object with its parameters."""
    sensitivity: bool = False
    """Sensitivity analysis: quality against the rank of one layer alone; takes longer."""
    runtime: Runtime = "auto"
    """Engine that runs the artifact; both models are measured on it. auto: torch_eager for a module."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """Quality guard: largest allowed drop of the metric, before minus after."""
    output: str | None = None
    """New folder for a copy of the artifact; must not exist yet."""
    plan: bool = False
    """Dry run: print the layers and their ranks, change nothing."""
