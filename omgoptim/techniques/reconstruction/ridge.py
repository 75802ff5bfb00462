"""Ridge regression from second moments: dense, and with a mask of weights that stay zero.

With inputs U (rows, n) and targets Y (rows, o), the Gram matrix is G = U'U and the cross moment C = U'Y. The damping is
a fraction of the mean of G's diagonal, which makes it independent of the scale and the number of rows. The solution of
low rank is in `low_rank.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30
"""Lower bound of denominators and of the damping: no float32 moment of a layer that is not silent lies below it."""

STEPS, TOLERANCE = 30, 1e-4
"""Maximum conjugate gradient steps, and the residual relative to the right side at which they end: the damping of 1e-2
bounds the condition number, and the weights change by less than their float32 rounding noise on data after that."""


def ridge(gram: Tensor, cross: Tensor, damping: float, prior: Tensor | None = None) -> Tensor:
    """Return the X that minimizes |U X - Y|^2 + l |X - prior|^2, l being `damping` times the mean of G's diagonal.

    Args:
        gram: G (..., n, n), symmetric and positive semidefinite; not changed.
        cross: C (..., n, o).
        damping: fraction of the mean diagonal.
        prior: X that the solution is held at, (..., n, o); None for zero.

    Returns:
        (..., n, o); NaN where the moments are not finite.
    """
    strength = damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(SMALLEST)
    damped = gram + strength * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    right = cross if prior is None else cross + strength * prior
    solved = torch.cholesky_solve(right, factor)
    return solved.masked_fill((failed != 0)[..., None, None], torch.nan)


def masked_ridge(
    gram: Tensor, cross: Tensor, kept: Tensor, damping: float, *, steps: int = STEPS, tolerance: float = TOLERANCE
) -> Tensor:
    """Return what `ridge` does under the condition that X is zero where `kept` is, output by output.

    All outputs are solved at once by conjugate gradients with a diagonal preconditioner, which needs no inverse for
    each output's own mask.

    Args:
        gram: G (groups, n, n).
        cross: C (groups, n, o).
        kept: 1 where X may differ from zero, (groups, n, o), of the dtype of G.
        damping: fraction of the mean diagonal.
        steps: most steps.
        tolerance: residual, relative to C, at which the steps end.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    strength = damping * diagonal.mean(1)[:, None, None].clamp_min(SMALLEST)
    preconditioner = kept / (diagonal[:, :, None] + strength)
    solution = torch.zeros_like(cross)
    residual = cross * kept
    goal = tolerance * residual.norm()
    direction = preconditioner * residual
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        if residual.norm() <= goal:
            break
        moved = (gram @ direction + strength * direction) * kept
        length = energy / (direction * moved).sum(1, keepdim=True).clamp_min(SMALLEST)
        solution += length * direction
        residual = residual - length * moved
        turned = preconditioner * residual
        energy, last = (residual * turned).sum(1, keepdim=True), energy
        direction = turned + energy / last.clamp_min(SMALLEST) * direction
    return solution
