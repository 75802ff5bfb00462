"""Factorized forms of a layer: possible ranks with their costs, and the factors for chosen ranks.

Linear and 1x1 convolutions are one matrix. `spatial` (kernel height x 1, then 1 x kernel width) is a matrix too, with
rows (out, x) and columns (in, y). Its inputs are whitened by the moment of (in, y), averaged over x; for the chosen
rank the second factor is then fitted to the whole moment by least squares. `tucker2` (1x1, kernel, 1x1) is in
`tucker.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omgoptim.techniques.factorize._low_rank import tucker
from omgoptim.techniques.factorize._low_rank.problem import Form, Option, Problem, ladder_of
from omgoptim.techniques.reconstruction.low_rank import (
    Factors,
    projected,
    singular_values,
    squared_error,
    truncate,
    truncate_by_outputs,
    whiten,
)


def ladder(problem: Problem, form: Form, round_to: int = 1) -> list[Option]:
    """Return the options of a form for a layer, the smallest first; the last one has full rank."""
    if form == "tucker2":
        return tucker.ladder(problem, round_to)
    groups, out, inside, height, width = problem.weight.shape
    values = _spatial_values if form == "spatial" else _matrix_values
    totals = torch.stack([values(problem, group) for group in range(groups)]).sum(0)
    per_rank = inside * height + out * width if form == "spatial" else inside * height * width + out
    return ladder_of(form, totals.tolist(), groups * per_rank, round_to)


def option_at(problem: Problem, form: Form, rank: int) -> Option:
    """Return the option with a fixed rank, of a matrix or of both sides of tucker2; at most that of the layer."""
    if form == "tucker2":
        return tucker.option_at(problem, min(rank, problem.weight.shape[2]), min(rank, problem.weight.shape[1]))
    options = ladder(problem, form)
    return options[min(rank, len(options)) - 1]


def solve(problem: Problem, option: Option) -> list[Tensor]:
    """Return the weights of the block's layers in order, groups joined as in a convolution's weight.

    Returns:
        linear: a (groups rank, in, 1, 1), b (out, rank, 1, 1); spatial: a (groups rank, in, kh, 1), b (out, rank, 1,
        kw); tucker2: a (groups rank_in, in, 1, 1), core (groups rank_out, rank_in, kh, kw), b (out, rank_out, 1, 1).
    """
    parts = [_solve_group(problem, option, group) for group in range(problem.groups)]
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def _solve_group(problem: Problem, option: Option, group: int) -> tuple[Tensor, ...]:
    if option.form == "tucker2":
        return tucker.solve(problem, group, *option.ranks)
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
        b = projected(problem.matrix(group), problem.moment[group], features)
        change = problem.matrix(group) - b @ features
        error = squared_error(change, problem.moment[group], problem.influence_root(group))
        solved.append((error, a.reshape(rank, inside, height, 1), b.reshape(out, rank, 1, width)))
    _, a, b = min(solved, key=lambda one: one[0])
    return a, b
