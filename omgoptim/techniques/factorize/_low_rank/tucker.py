"""Tucker-2 of a convolution's weight: separate ranks for input and output channels.

The bases come from the higher-order SVD, whitened: on the input side by the second moment of the channels (averaged
over the kernel's positions), on the output side by their influence; then a few sweeps of higher-order orthogonal
iteration update each side with the other one truncated. For the chosen input basis, core and output factor are last
fitted to the whole moment: a truncated SVD in the space of the first convolution's outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omgoptim.techniques.factorize._low_rank.problem import Option, Problem
from omgoptim.techniques.reconstruction.low_rank import (
    INPUT_DAMPING,
    cholesky,
    projected,
    squared_error,
    truncate,
)

SWEEPS = 3
"""Sweeps of orthogonal iteration; on the digits example more than one change the output error by less than 0.001."""

RUNGS = 48
"""Steps of each side from rank 1 to the full rank."""


def params_of(problem: Problem, rank_in: int, rank_out: int) -> int:
    """Return the parameters of the three convolutions."""
    groups, out, inside, height, width = problem.weight.shape
    return groups * (rank_in * inside + rank_in * rank_out * height * width + rank_out * out)


def ladder(problem: Problem, round_to: int) -> list[Option]:
    """Return pairs of ranks from the smallest up: each step raises the side that regains more per parameter."""
    _, out, inside, _, _ = problem.weight.shape
    left_in, left_out = _left(problem, "in"), _left(problem, "out")
    steps_in, steps_out = _steps(inside, round_to), _steps(out, round_to)
    i = o = 0
    options = []
    while True:
        rank_in, rank_out = steps_in[i], steps_out[o]
        here = params_of(problem, rank_in, rank_out)
        options.append(Option("tucker2", (rank_in, rank_out), here, left_in[rank_in] + left_out[rank_out]))
        gains = []
        if i + 1 < len(steps_in):
            more = params_of(problem, steps_in[i + 1], rank_out) - here
            gains.append(((left_in[rank_in] - left_in[steps_in[i + 1]]) / more, "in"))
        if o + 1 < len(steps_out):
            more = params_of(problem, rank_in, steps_out[o + 1]) - here
            gains.append(((left_out[rank_out] - left_out[steps_out[o + 1]]) / more, "out"))
        if not gains:
            return options
        if max(gains)[1] == "in":
            i += 1
        else:
            o += 1


def option_at(problem: Problem, rank_in: int, rank_out: int) -> Option:
    """Return the option with given ranks."""
    error = _left(problem, "in")[rank_in] + _left(problem, "out")[rank_out]
    return Option("tucker2", (rank_in, rank_out), params_of(problem, rank_in, rank_out), error)


def solve(problem: Problem, group: int, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the three convolutions of one group.

    Both bases of the inputs are tried, whitened and plain: the average over the positions may mislead.

    Returns:
        (rank_in, in, 1, 1), (rank_out, rank_in, kh, kw), (out, rank_out, 1, 1).
    """
    bases = [_input_basis(problem, group, rank_in, rank_out, white=True)]
    if problem.moment is not None:
        bases.append(_input_basis(problem, group, rank_in, rank_out, white=False))
    _, *parts = min((_rest(problem, group, a, rank_out) for a in bases), key=lambda one: one[0])
    a, core, b = parts
    return a[..., None, None], core.reshape(rank_out, rank_in, *problem.kernel), b[..., None, None]


def _input_basis(problem: Problem, group: int, rank_in: int, rank_out: int, white: bool) -> Tensor:
    """Return the first convolution's weight, (rank_in, in)."""
    weight = _whitened(problem, group, white)
    basis_in = _basis(weight, "in", rank_in)
    for _ in range(SWEEPS):
        basis_out = _basis(torch.einsum("oiyx,ir->oryx", weight, basis_in), "out", rank_out)
        basis_in = _basis(torch.einsum("oiyx,os->siyx", weight, basis_out), "in", rank_in)
    root = problem.part_root("channels", group) if white else None
    if root is None:
        return basis_in.mT
    a: Tensor = torch.linalg.solve_triangular(root, basis_in.mT, upper=False, left=False)
    return a


def _rest(problem: Problem, group: int, a: Tensor, rank_out: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """Return the error, `a`, and the best core (rank_out, rank_in kh kw) and output factor (out, rank_out) for it."""
    positions = math.prod(problem.kernel)
    features = torch.kron(a.contiguous(), torch.eye(positions, dtype=a.dtype, device=a.device))
    moment = None if problem.moment is None else problem.moment[group]
    influence = problem.influence_root(group)
    seen = projected(problem.matrix(group), moment, features)
    inner = features @ features.mT if moment is None else features @ moment @ features.mT
    factors = truncate(seen, rank_out, cholesky(inner, INPUT_DAMPING), influence)
    error = squared_error(problem.matrix(group) - factors.product @ features, moment, influence)
    return error, a, factors.a, factors.b


def _whitened(problem: Problem, group: int, white: bool = True) -> Tensor:
    """Return the weight (out, in, kh, kw) in whitened coordinates, the kernel's positions taken as uncorrelated.

    Args:
        problem: of the layer.
        group: of its groups.
        white: False to take all inputs for the same, too.
    """
    weight, influence = problem.weight[group], problem.influence_root(group)
    root = problem.part_root("channels", group) if white else None
    if root is not None:
        weight = torch.einsum("oiyx,ij->ojyx", weight, root)
    return weight if influence is None else torch.einsum("op,oiyx->piyx", influence, weight)


def _unfolding(weight: Tensor, side: str) -> Tensor:
    """Return the weight unfolded along one side: (in, out kh kw) or (out, in kh kw)."""
    return (weight.transpose(0, 1) if side == "in" else weight).flatten(1)


def _basis(weight: Tensor, side: str, rank: int) -> Tensor:
    """Return the first left singular vectors of an unfolding: (channels, rank)."""
    unfolded = _unfolding(weight, side)
    vectors: Tensor = torch.linalg.eigh(
        unfolded @ unfolded.mT
    ).eigenvectors  # complete, where the unfolding has fewer columns
    return vectors.flip(1)[:, :rank]


def _left(problem: Problem, side: str) -> list[float]:
    """Return the error of truncating one side, by the rank: index 0 to the number of channels."""
    channels = problem.weight.shape[2 if side == "in" else 1]
    total = torch.zeros(channels, dtype=torch.float64)
    for group in range(problem.groups):
        values = torch.linalg.svdvals(_unfolding(_whitened(problem, group), side)).square().cpu()
        total[: len(values)] += values
    left = total.flip(0).cumsum(0).flip(0).tolist()
    return [*left, 0.0]


def _steps(channels: int, round_to: int) -> list[int]:
    step = round_to * -(-channels // (RUNGS * round_to))
    return sorted({*range(step, channels + 1, step), channels})
