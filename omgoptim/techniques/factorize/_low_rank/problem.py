"""Weighted low-rank approximation problem of one layer, and its candidate ranks.

A layer's weight is (groups, out, in, kernel height, kernel width) here, a Linear's and a 1x1 convolution's too, so that
grouped convolutions are factorized in each group, all with the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from omgoptim.techniques.reconstruction.low_rank import (
    INFLUENCE_DAMPING,
    INPUT_DAMPING,
    cholesky,
    squared_error,
)

Form = Literal["linear", "spatial", "tucker2"]


@dataclass(frozen=True, slots=True)
class Option:
    """Ranks that a layer could have."""

    form: Form
    ranks: tuple[int, ...]
    """Rank of a Linear or a spatial convolution; rank in and rank out of tucker2."""
    params: int
    """Parameters of the factors, without the bias."""
    error: float
    """Squared error of the layer's output: E|R.T (W - W') x|² over a sample, an estimate for convolutions."""

    def __str__(self) -> str:
        kind = {"linear": "rank", "spatial": "spatial, rank", "tucker2": "tucker2, ranks"}[self.form]
        return f"{kind} {' and '.join(map(str, self.ranks))}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A weight, and the metric in which its approximation is measured."""

    weight: Tensor
    """(groups, out, in, kernel height, kernel width), float64."""
    moment: Tensor | None = None
    """E[x xᵀ] of the inputs, centred where a bias takes up the mean: (groups, n, n), n = in * height * width. None:
    all inputs count the same."""
    outputs: Tensor | None = None
    """Used instead where n is too large: E[y yᵀ], (groups, out, out). Linear and 1x1 only."""
    influence: Tensor | None = None
    """Influence of the outputs on the model's: (groups, out, out). None: all the same."""
    roots: dict[str, list[Tensor]] = field(default_factory=dict)
    """Cached Cholesky factors."""

    @property
    def groups(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel(self) -> tuple[int, int]:
        return self.weight.shape[3], self.weight.shape[4]

    def matrix(self, group: int) -> Tensor:
        """Return the weight of a group as the matrix (out, n)."""
        return self.weight[group].flatten(1)

    def inputs_root(self, group: int) -> Tensor | None:
        """Return S of the whole moment, (n, n)."""
        return None if self.moment is None else self._root("inputs", self.moment, INPUT_DAMPING, group)

    def influence_root(self, group: int) -> Tensor | None:
        """Return R, (out, out)."""
        return None if self.influence is None else self._root("influence", self.influence, INFLUENCE_DAMPING, group)

    def part_root(self, part: Literal["channels", "rows"], group: int) -> Tensor | None:
        """Return S of the moment of the channels (in, in), or of channels x kernel height, averaged over the rest."""
        if self.moment is None:
            return None
        if part not in self.roots:
            kept, (height, width) = self.weight.shape[2], self.kernel
            side = (height, width) if part == "rows" else (1, height * width)
            n = kept * side[0]
            blocks = self.moment.reshape(self.groups, n, side[1], n, side[1])
            averaged = torch.einsum("gixjx->gij", blocks) / side[1]
            self.roots[part] = [cholesky(one, INPUT_DAMPING) for one in averaged]
        return self.roots[part][group]

    def _root(self, name: str, moment: Tensor, damping: float, group: int) -> Tensor:
        if name not in self.roots:
            self.roots[name] = [cholesky(one, damping) for one in moment]
        return self.roots[name][group]

    def error(self, change: Tensor) -> float:
        """Return E|R.T D x|² for a change D of the weight, in its shape. Without moments: of white inputs."""
        total = 0.0
        for group in range(self.groups):
            moment = None if self.moment is None else self.moment[group]
            total += squared_error(change[group].flatten(1), moment, self.influence_root(group))
        return total

    @property
    def energy(self) -> float:
        """Return the energy of its whole output, in the units of `error`."""
        if self.outputs is None:
            return self.error(self.weight)
        total = 0.0
        for group in range(self.groups):
            root = self.influence_root(group)
            one = self.outputs[group]
            total += float((one if root is None else root.mT @ one @ root).trace())
        return total


def ladder_of(form: Form, costs: Sequence[float], params_per_rank: int, round_to: int) -> list[Option]:
    """Return the options of a form with one rank, the smallest first.

    Args:
        form: linear or spatial.
        costs: squared singular values, the largest first; what a rank costs is the sum of those after it.
        params_per_rank: what one more rank adds.
        round_to: ranks are multiples of it; the full rank is one too.
    """
    left = [0.0]
    for cost in reversed(costs):
        left.append(left[-1] + max(cost, 0.0))
    left.reverse()
    full = len(costs)
    ranks = sorted({*range(round_to, full + 1, round_to), full})
    return [Option(form, (rank,), rank * params_per_rank, left[rank]) for rank in ranks]
