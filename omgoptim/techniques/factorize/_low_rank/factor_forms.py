"""Factorized forms of a layer: possible ranks with their costs, and the factors for chosen ranks.

Linear and 1x1 convolutions are one matrix. `spatial` (kernel height x 1, then 1 x kernel width) is a matrix too, with
rows (out, x) and columns (in, y). Its inputs are whitened by the moment of (in, y), averaged over x; for the chosen
rank the second factor is then fitted to the whole moment by least squares. `tucker2` (1x1, kernel, 1x1) has separate
ranks for input and output channels: its bases come from the higher-order SVD, whitened on the input side by the second
moment of the channels (averaged over the kernel's positions), on the output side by their influence; a few sweeps of
higher-order orthogonal iteration update each side with the other one truncated. For the chosen input basis, core and
output factor are fitted to the whole moment: a truncated SVD in the space of the first convolution's outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omgoptim.techniques.factorize._low_rank.problem import Form, Problem, RankOption, options_by_rank
from omgoptim.techniques.reconstruction.least_squares import (
    INPUT_DAMPING,
    Factors,
    cholesky,
    fit_to_features,
    singular_values,
    squared_error,
    truncate,
    truncate_by_outputs,
    whiten,
)

SWEEPS = 3
"""Sweeps of orthogonal iteration; on the digits example more than one change the output error by less than 0.001."""

TUCKER_STEPS = 48
"""Steps of each side from rank 1 to the full rank, 2 % of it each. Chosen: finer steps cost a projection each."""


def rank_options(problem: Problem, form: Form, round_to: int = 1) -> list[RankOption]:
    """Return the options of a form for a layer, the smallest first; the last one has full rank."""
    if form == "tucker2":
        return _tucker_options(problem, round_to)
    groups, out, inside, height, width = problem.weight.shape
    values = _spatial_values if form == "spatial" else _matrix_values
    totals = torch.stack([values(problem, group) for group in range(groups)]).sum(0)
    per_rank = inside * height + out * width if form == "spatial" else inside * height * width + out
    return options_by_rank(form, totals.tolist(), groups * per_rank, round_to)


def option_at(problem: Problem, form: Form, rank: int) -> RankOption:
    """Return the option with a fixed rank, of a matrix or of both sides of tucker2; at most that of the layer."""
    if form == "tucker2":
        return _tucker_option(problem, min(rank, problem.weight.shape[2]), min(rank, problem.weight.shape[1]))
    options = rank_options(problem, form)
    return options[min(rank, len(options)) - 1]


def solve(problem: Problem, option: RankOption) -> list[Tensor]:
    """Return the weights of the block's layers in order, groups joined as in a convolution's weight.

    Returns:
        linear: a (groups rank, in, 1, 1), b (out, rank, 1, 1); spatial: a (groups rank, in, kh, 1), b (out, rank, 1,
        kw); tucker2: a (groups rank_in, in, 1, 1), core (groups rank_out, rank_in, kh, kw), b (out, rank_out, 1, 1).
    """
    parts = [_solve_group(problem, option, group) for group in range(problem.groups)]
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def _solve_group(problem: Problem, option: RankOption, group: int) -> tuple[Tensor, ...]:
    if option.form == "tucker2":
        return _solve_tucker(problem, group, *option.ranks)
    (rank,) = option.ranks
    if option.form == "spatial":
        return _solve_spatial(problem, group, rank)
    factors = _matrix_factors(problem, group, rank)
    return factors.a[..., None, None], factors.b[..., None, None]


def _matrix_values(problem: Problem, group: int) -> Tensor:
    """Return the squared singular values."""
    influence = problem.influence_root(group)
    if problem.outputs is not None:
        energies: Tensor = torch.linalg.eigvalsh(whiten(problem.outputs[group], influence, influence))
        return energies.flip(0).clamp(min=0)
    return singular_values(problem.matrix(group), problem.inputs_root(group), influence).square()


def _matrix_factors(problem: Problem, group: int, rank: int) -> Factors:
    influence = problem.influence_root(group)
    if problem.outputs is not None:
        return truncate_by_outputs(problem.matrix(group), rank, problem.outputs[group], influence)
    return truncate(problem.matrix(group), rank, problem.inputs_root(group), influence)


def _spatial_matrix(problem: Problem, group: int) -> Tensor:
    """Return (out, in, kh, kw) as the matrix (out kw, in kh)."""
    return problem.weight[group].permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def _spread(root: Tensor | None, width: int) -> Tensor | None:
    """Return R for the rows (out, x) of the spatial matrix: the same for each x."""
    return (
        None if root is None else torch.kron(root.contiguous(), torch.eye(width, dtype=root.dtype, device=root.device))
    )


def _spatial_values(problem: Problem, group: int) -> Tensor:
    influence = _spread(problem.influence_root(group), problem.kernel[1])
    return singular_values(_spatial_matrix(problem, group), problem.part_root("rows", group), influence).square()


def _solve_spatial(problem: Problem, group: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the better factors of a whitened and a plain basis of the inputs: the average over x may mislead."""
    _, out, inside, height, width = problem.weight.shape
    influence = _spread(problem.influence_root(group), width)
    found = truncate(_spatial_matrix(problem, group), rank, problem.part_root("rows", group), influence)
    if problem.moment is None:
        return found.a.reshape(rank, inside, height, 1), found.b.reshape(out, width, rank).mT[:, :, None, :]
    plain = truncate(_spatial_matrix(problem, group), rank, None, influence)
    across = torch.eye(width, dtype=found.a.dtype, device=found.a.device)
    solved = []
    for a in (found.a, plain.a):
        features = torch.kron(a.contiguous(), across)  # (rank x, in y x): what the first convolution gives at each x
        b = fit_to_features(problem.matrix(group), problem.moment[group], features)
        change = problem.matrix(group) - b @ features
        error = squared_error(change, problem.moment[group], problem.influence_root(group))
        solved.append((error, a.reshape(rank, inside, height, 1), b.reshape(out, rank, 1, width)))
    _, a, b = min(solved, key=lambda one: one[0])
    return a, b


def _tucker_params(problem: Problem, rank_in: int, rank_out: int) -> int:
    """Return the parameters of the three convolutions."""
    groups, out, inside, height, width = problem.weight.shape
    return groups * (rank_in * inside + rank_in * rank_out * height * width + rank_out * out)


def _tucker_options(problem: Problem, round_to: int) -> list[RankOption]:
    """Return pairs of ranks from the smallest up: each step raises the side that regains more per parameter."""
    _, out, inside, _, _ = problem.weight.shape
    left_in, left_out = _truncation_errors(problem, "in"), _truncation_errors(problem, "out")
    steps_in, steps_out = _steps(inside, round_to), _steps(out, round_to)
    i = o = 0
    options = []
    while True:
        rank_in, rank_out = steps_in[i], steps_out[o]
        here = _tucker_params(problem, rank_in, rank_out)
        options.append(RankOption("tucker2", (rank_in, rank_out), here, left_in[rank_in] + left_out[rank_out]))
        gains = []
        if i + 1 < len(steps_in):
            more = _tucker_params(problem, steps_in[i + 1], rank_out) - here
            gains.append(((left_in[rank_in] - left_in[steps_in[i + 1]]) / more, "in"))
        if o + 1 < len(steps_out):
            more = _tucker_params(problem, rank_in, steps_out[o + 1]) - here
            gains.append(((left_out[rank_out] - left_out[steps_out[o + 1]]) / more, "out"))
        if not gains:
            return options
        if max(gains)[1] == "in":
            i += 1
        else:
            o += 1


def _tucker_option(problem: Problem, rank_in: int, rank_out: int) -> RankOption:
    """Return the option with given ranks."""
    error = _truncation_errors(problem, "in")[rank_in] + _truncation_errors(problem, "out")[rank_out]
    return RankOption("tucker2", (rank_in, rank_out), _tucker_params(problem, rank_in, rank_out), error)


def _solve_tucker(problem: Problem, group: int, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the three convolutions of one group.

    Both bases of the inputs are tried, whitened and plain: the average over the positions may mislead.

    Returns:
        (rank_in, in, 1, 1), (rank_out, rank_in, kh, kw), (out, rank_out, 1, 1).
    """
    bases = [_input_basis(problem, group, rank_in, rank_out, white=True)]
    if problem.moment is not None:
        bases.append(_input_basis(problem, group, rank_in, rank_out, white=False))
    _, *parts = min((_fit_core_and_output(problem, group, a, rank_out) for a in bases), key=lambda one: one[0])
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


def _fit_core_and_output(
    problem: Problem, group: int, a: Tensor, rank_out: int
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Return the error, `a`, and the best core (rank_out, rank_in kh kw) and output factor (out, rank_out) for it."""
    positions = math.prod(problem.kernel)
    features = torch.kron(a.contiguous(), torch.eye(positions, dtype=a.dtype, device=a.device))
    moment = None if problem.moment is None else problem.moment[group]
    influence = problem.influence_root(group)
    seen = fit_to_features(problem.matrix(group), moment, features)
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


def _truncation_errors(problem: Problem, side: str) -> list[float]:
    """Return the error of truncating one side, by the rank: index 0 to the number of channels."""
    channels = problem.weight.shape[2 if side == "in" else 1]
    total = torch.zeros(channels, dtype=torch.float64)
    for group in range(problem.groups):
        values = torch.linalg.svdvals(_unfolding(_whitened(problem, group), side)).square().cpu()
        total[: len(values)] += values
    left = total.flip(0).cumsum(0).flip(0).tolist()
    return [*left, 0.0]


def _steps(channels: int, round_to: int) -> list[int]:
    step = round_to * -(-channels // (TUCKER_STEPS * round_to))
    return sorted({*range(step, channels + 1, step), channels})
