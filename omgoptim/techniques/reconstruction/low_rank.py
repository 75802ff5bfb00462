"""Best low-rank approximation of a weight under a weighted norm, in closed form.

With inputs x of second moment C = E[x xᵀ] = S Sᵀ (S its Cholesky factor) and outputs whose changes matter by
G = R Rᵀ, the expected cost of putting W' for W is E|Rᵀ (W - W') x|² = |Rᵀ (W - W') S|², a Frobenius norm. So the best
W' of rank k is the truncated SVD of Rᵀ W S taken back, and what it costs is exactly the sum of the squares of the
singular values that were cut off. Without C and G that is the plain SVD of W.

Everything is float64. C is damped by a small multiple of its mean diagonal, so that it has a factor at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omgoptim.techniques.reconstruction.ridge import ridge

INPUT_DAMPING = 1e-6
"""Damping of an input's second moment, as a fraction of its mean diagonal."""

INFLUENCE_DAMPING = 1.0
"""Damping of the outputs' influence: it is a rough estimate from few gradients."""

DAMPING_STEPS = 12
"""Attempts at a Cholesky factor, each with ten times the damping, where rounding left a moment indefinite."""


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


def fit(weight: Tensor, cross: Tensor, moment: Tensor, damping: float) -> Tensor:
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


def projected(weight: Tensor, moment: Tensor | None, features: Tensor, damping: float = INPUT_DAMPING) -> Tensor:
    """Return the weight X with the smallest E|W x - X F x|²: the best use of given features of the inputs.

    Args:
        weight: W (out, in).
        moment: E[x xᵀ] (in, in); None for the identity.
        features: F (features, in).
        damping: keeps features that hardly vary from large weights.

    Returns:
        X (out, features).
    """
    seen = features if moment is None else features @ moment
    gram = seen @ features.mT
    return ridge(gram, seen @ weight.mT, damping).mT


def squared_error(change: Tensor, moment: Tensor | None, influence: Tensor | None = None) -> float:
    """Return E|Rᵀ D x|² for a change D (out, in) of a weight: trace(Rᵀ D C Dᵀ R), C the moment of the inputs."""
    change = whiten(change, None, influence)
    return float(((change if moment is None else change @ moment) * change).sum())
