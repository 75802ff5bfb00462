"""Round a weight input by input, each error made good by the inputs not rounded yet. Registers no technique.

With H = E[x x'] over a layer's inputs, the error of its output is trace(D' H D), D = what rounding changed. Row k of
the weight is rounded, and the rows after it move so that this error stays least: for U upper triangular with
inverse(H) = U' U, they lose U[k, later] / U[k, k] times the error of row k.
Source: arXiv:2210.17323 (GPTQ). Differs in the groups' scales, which are searched (group_rounding.py) on the moved
weights, and in being kept only where moments of other samples than it was fitted to agree (weight_only.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from omgoptim.techniques.quantize.group_rounding import Float, Groups, integers, round_groups

DAMPING = 0.01
"""Of the mean of H's diagonal, added to the diagonal: few samples say little about some directions."""


def round_with_feedback(w_KN: Float, h_KK: Float, group_size: int, num_bits: int, symmetric: bool) -> Groups:
    """As `round_groups`, with the second moments (K, K) of the layer's inputs.

    Raises:
        numpy.linalg.LinAlgError: the moments are no positive definite matrix.
    """
    u_KK = _factor(h_KK)
    importance_K = np.diagonal(h_KK).astype(np.float32) + np.float32(1e-12)
    left_KN = w_KN.astype(np.float64)
    rounded: list[Groups] = []
    for start in range(0, len(w_KN), group_size):
        end = start + group_size
        block_BN, error_BN = left_KN[start:end], np.empty((group_size, w_KN.shape[1]))
        group = round_groups(block_BN.astype(np.float32), group_size, num_bits, symmetric, importance_K[start:end])
        s_N, z_N = group.s_GN[0].astype(np.float64), group.z_GN[0].astype(np.float64)
        q_BN = np.empty_like(group.q_KN)
        for row in range(group_size):
            k = start + row
            q_N = integers(block_BN[row], s_N, z_N, num_bits)
            error_BN[row] = (block_BN[row] - (q_N - z_N) * s_N) / u_KK[k, k]
            block_BN[row + 1 :] -= np.outer(u_KK[k, k + 1 : end], error_BN[row])
            q_BN[row] = q_N
        left_KN[end:] -= u_KK[start:end, end:].T @ error_BN
        rounded.append(Groups(q_BN, group.s_GN, group.z_GN))
    parts = ([getattr(group, name) for group in rounded] for name in ("q_KN", "s_GN", "z_GN"))
    return Groups(*(np.concatenate(part) for part in parts))


def output_error(w_KN: Float, groups: Groups, h_KK: Float) -> float:
    """Mean squared error of the layer's output, summed over outputs: trace(D' H D)."""
    off_KN = groups.weight() - w_KN
    return float((off_KN * (h_KK @ off_KN)).sum())


def _factor(h_KK: Float) -> NDArray[np.float64]:
    """U, upper triangular, with inverse(H) = U' U; an input that is always 0 counts as one that nothing depends on."""
    damped = h_KK.astype(np.float64)
    diagonal = np.diagonal(damped)
    added = DAMPING * diagonal.mean() + 1e-12
    damped[np.diag_indices_from(damped)] = np.where(diagonal > 0, diagonal, diagonal.mean() + 1e-12) + added
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float64)
