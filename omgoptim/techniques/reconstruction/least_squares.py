"""Least-squares solutions from second moments: ridge regression, and the best approximation of low rank.

With inputs U (rows, n) and targets Y (rows, o), the Gram matrix is G = U'U and the cross moment C = U'Y. The damping is
a fraction of the mean of G's diagonal, which makes it independent of the scale and the number of rows.

Low rank: with inputs x of second moment C = E[x xᵀ] = S Sᵀ (S its Cholesky factor) and outputs whose changes matter by
G = R Rᵀ, the expected cost of putting W' for W is E|Rᵀ (W - W') x|² = |Rᵀ (W - W') S|², a Frobenius norm. So the best
W' of rank k is the truncated SVD of Rᵀ W S taken back, and its cost is the sum of the squares of the singular values
that were cut off. Without C and G that is the plain SVD of W. C is damped, so that it has a factor at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30
"""Lower bound of denominators and of the damping: no float32 moment of a layer that is not silent lies below it."""

STEPS, TOLERANCE = 30, 1e-4
"""Maximum conjugate gradient steps, and the residual relative to the right side at which they end: the damping of 1e-2
bounds the condition number, and the weights change by less than their float32 rounding noise on data after that."""

INPUT_DAMPING = 1e-6
"""Damping of an input's second moment, as a fraction of its mean diagonal. Chosen: above the rounding of sums of
products of float32 inputs (6e-8), so that collinear inputs leave a factor, and far below any input that matters."""

INFLUENCE_DAMPING = 1.0
"""Damping of the outputs' influence. Chosen large: it is a rough estimate from few gradients."""

DAMPING_STEPS = 12
"""Attempts at a Cholesky factor, each with ten times the damping, where rounding left a moment indefinite: the last has
1e5 times the mean diagonal, which no rounding outweighs."""


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
    strength = damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(TINY)
    damped = gram + strength * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    right = cross if prior is None else cross + strength * prior
    solved = torch.cholesky_solve(right, factor)
    return solved.masked_fill((failed != 0)[..., None, None], torch.nan)


def masked_ridge(
    gram: Tensor, cross: Tensor, kept: Tensor, damping: float, *, steps: int = STEPS, tolerance: float = TOLERANCE
) -> Tensor:
    """Solve `ridge` under the condition that X is zero where `kept` is, output by output.

    All outputs are solved at once by conjugate gradients with a diagonal preconditioner, which needs no inverse for
    each output's own mask.

    Args:
        gram: G (groups, n, n).
        cross: C (groups, n, o).
        kept: 1 where X may differ from zero, (groups, n, o), of the dtype of G.
        damping: fraction of the mean diagonal.
        steps: maximum number of steps.
        tolerance: residual, relative to C, at which the steps end.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    strength = damping * diagonal.mean(1)[:, None, None].clamp_min(TINY)
    preconditioner = kept / (diagonal[:, :, None] + strength)
    solution = torch.zeros_like(cross)
    residual = cross * kept
    threshold = tolerance * residual.norm()
    direction = preconditioner * residual
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        if residual.norm() <= threshold:
            break
        product = (gram @ direction + strength * direction) * kept
        length = energy / (direction * product).sum(1, keepdim=True).clamp_min(TINY)
        solution += length * direction
        residual = residual - length * product
        preconditioned = preconditioner * residual
        energy, last = (residual * preconditioned).sum(1, keepdim=True), energy
        direction = preconditioned + energy / last.clamp_min(TINY) * direction
    return solution


@dataclass(frozen=True, slots=True)
class Factors:
    """W' = b a."""

    b: Tensor
    """(out, rank)"""
    a: Tensor
    """(rank, in)"""

    @property
    def product(self) -> Tensor:
        """The product b a, (out, in)."""
        return self.b @ self.a


def cholesky(moment: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of a damped second moment.

    Args:
        moment: (n, n), symmetric and positive semidefinite up to rounding.
        damping: what is added to the diagonal, as a fraction of its mean.

    Returns:
        (n, n), lower triangular. The identity for a moment that is zero: nothing is known about such inputs.
    """
    moment = (moment + moment.mT) / 2
    scale = moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if not scale > 0:
        return identity
    factor = identity
    for step in range(DAMPING_STEPS):
        factor, failed = torch.linalg.cholesky_ex(moment + damping * 10.0**step * scale * identity)
        if not failed:
            break
    return factor


def whiten(weight: Tensor, inputs: Tensor | None = None, influence: Tensor | None = None) -> Tensor:
    """Return Rᵀ W S: the weight in coordinates in which every change costs the same.

    Args:
        weight: (out, in).
        inputs: S (in, in), lower triangular; None for the identity.
        influence: R (out, out), lower triangular; None for the identity.
    """
    if inputs is not None:
        weight = weight @ inputs
    return weight if influence is None else influence.mT @ weight


def singular_values(weight: Tensor, inputs: Tensor | None = None, influence: Tensor | None = None) -> Tensor:
    """Return the singular values of Rᵀ W S, the largest first: (min(out, in),)."""
    values: Tensor = torch.linalg.svdvals(whiten(weight, inputs, influence))
    return values


def truncate(weight: Tensor, rank: int, inputs: Tensor | None = None, influence: Tensor | None = None) -> Factors:
    """Return the product of rank `rank` with the smallest |Rᵀ (W - b a) S|; arguments as for `whiten`.

    The singular values are shared evenly: both factors get their square root, which keeps the two at one scale for
    training. The signs are fixed (the largest entry of each column of b is positive), so that the same weight gives the
    same factors.
    """
    u, s, vh = torch.linalg.svd(whiten(weight, inputs, influence), full_matrices=False)
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    if influence is not None:
        b = torch.linalg.solve_triangular(influence.mT, b, upper=True)
    if inputs is not None:
        a = torch.linalg.solve_triangular(inputs, a, upper=False, left=False)
    return _with_fixed_signs(b, a)


def truncate_by_outputs(weight: Tensor, rank: int, outputs: Tensor, influence: Tensor | None = None) -> Factors:
    """Return the same product as `truncate` from the second moment of the outputs, for very wide inputs.

    The left singular vectors U of Rᵀ W S are the eigenvectors of Rᵀ W C Wᵀ R = Rᵀ E[y yᵀ] R, and the best W' is
    R⁻ᵀ U Uᵀ Rᵀ W.

    Args:
        weight: (out, in).
        rank: at most out.
        outputs: E[y yᵀ] (out, out) of y = W x.
        influence: R (out, out), lower triangular; None for the identity.
    """
    energies, vectors = torch.linalg.eigh(whiten(outputs, influence, influence))
    u = vectors[:, -rank:].flip(1)
    scale = energies[-rank:].flip(0).clamp(min=0).pow(0.25)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    b, a = u * scale, (u.mT @ whiten(weight, None, influence)) / scale[:, None]
    if influence is not None:
        b = torch.linalg.solve_triangular(influence.mT, b, upper=True)
    return _with_fixed_signs(b, a)


def _with_fixed_signs(b: Tensor, a: Tensor) -> Factors:
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(b.dtype)
    return Factors(b * signs, a * signs.mT)


def fit_to_inputs(weight: Tensor, cross: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Return the weight M that gives on new inputs z what W gave on the old x, in least squares.

    Minimizes E|W x - M z|² + d |M - W|², d being `damping` times the mean diagonal of E[z zᵀ].

    Args:
        weight: W (out, in).
        cross: E[x zᵀ] (in, in).
        moment: E[z zᵀ] (in, in).
        damping: how strongly M is held at W.

    Returns:
        M (out, in).
    """
    return ridge(moment, (weight @ cross).mT, damping, prior=weight.mT).mT


def fit_to_features(weight: Tensor, moment: Tensor | None, features: Tensor, damping: float = INPUT_DAMPING) -> Tensor:
    """Return the weight X with the smallest E|W x - X F x|²: the best use of given features of the inputs.

    Args:
        weight: W (out, in).
        moment: E[x xᵀ] (in, in); None for the identity.
        features: F (features, in).
        damping: keeps features that hardly vary from large weights.

    Returns:
        X (out, features).
    """
    correlation = features if moment is None else features @ moment
    gram = correlation @ features.mT
    return ridge(gram, correlation @ weight.mT, damping).mT


def squared_error(change: Tensor, moment: Tensor | None, influence: Tensor | None = None) -> float:
    """Return E|Rᵀ D x|² for a change D (out, in) of a weight: trace(Rᵀ D C Dᵀ R), C the moment of the inputs."""
    change = whiten(change, None, influence)
    return float(((change if moment is None else change @ moment) * change).sum())
