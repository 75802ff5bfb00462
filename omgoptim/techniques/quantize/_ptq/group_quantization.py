"""Quantize a weight in groups that share a scale, with the scales of least squared error.

    w_KN ~ (q_KN - z_GN) * s_GN,   group g of column n = rows g * B .. g * B + B - 1

A group's range is not just its smallest and largest weight: with 16 levels, cutting one outlier off often costs less
than the coarser step for all the others. A few shrunk ranges are tried for every group, and the scale of the best is
fitted to its integers by least squares.

Legend: K inputs, N outputs, B weights of a group, G = K / B groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

Bytes = NDArray[np.uint8]

SHRINKS: dict[int, tuple[float, ...]] = {4: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 8: ()}
"""Clipping ratios of a group's range that are tried besides 1, by bits: with 256 levels clipping brings nothing."""

CHUNK = 2**17
"""Weights per chunk: the temporary arrays of the search fit the processor's cache."""


@dataclass(frozen=True, slots=True)
class QuantizedGroups:
    """A rounded weight."""

    q_KN: Bytes
    s_GN: Float
    z_GN: Bytes

    def weight(self) -> Float:
        """Return the dequantized weight (K, N)."""
        size = len(self.q_KN) // len(self.s_GN)
        q_GBN = self.q_KN.reshape(len(self.s_GN), size, -1).astype(np.float32)
        return ((q_GBN - self.z_GN[:, None]) * self.s_GN[:, None]).reshape(self.q_KN.shape)


def quantize_groups(
    w_KN: Float, group_size: int, num_bits: int, symmetric: bool, importance_K: Float | None = None
) -> QuantizedGroups:
    """Quantize every group independently.

    Args:
        w_KN: the weight; K is a multiple of `group_size`.
        group_size: consecutive inputs that share a scale and a zero point.
        num_bits: 4 or 8; integers are 0 .. 2 ** num_bits - 1.
        symmetric: whether every zero point is 2 ** (num_bits - 1).
        importance_K: what an error in a weight of each input costs, for instance the mean of the input's square.
    """
    size_K, size_N = w_KN.shape
    step = max(1, CHUNK // size_K)
    h_K = np.ones(size_K, np.float32) if importance_K is None else importance_K
    h_GB1 = h_K.reshape(-1, group_size, 1)
    parts = [
        _best(
            w_KN[:, start : start + step].reshape(-1, group_size, min(step, size_N - start)), h_GB1, num_bits, symmetric
        )
        for start in range(0, size_N, step)
    ]
    q_GBN, s_GN, z_GN = (np.concatenate([part[index] for part in parts], axis=-1) for index in range(3))
    return QuantizedGroups(q_GBN.reshape(size_K, size_N), s_GN.astype(np.float32), z_GN)


def integers(w: Float, s: Float, z: Float, num_bits: int) -> Float:
    """Round to the nearest integers, still as floats; shapes broadcast."""
    q: Float = w / s
    np.rint(q, out=q)
    q += z
    np.clip(q, 0, 2**num_bits - 1, out=q)
    return q


def _best(w_GBN: Float, h_GB1: Float, num_bits: int, symmetric: bool) -> tuple[Bytes, Float, Bytes]:
    s_GN, z_GN = _range(w_GBN, 1.0, num_bits, symmetric)
    error_GN = _error(w_GBN, h_GB1, s_GN, z_GN, num_bits)
    for shrink in SHRINKS[num_bits]:
        tried = _range(w_GBN, shrink, num_bits, symmetric)
        s_GN, z_GN, error_GN = _better((s_GN, z_GN, error_GN), (*tried, _error(w_GBN, h_GB1, *tried, num_bits)))
    fitted_GN = _fitted(w_GBN, h_GB1, s_GN, z_GN, num_bits)
    tried_error = _error(w_GBN, h_GB1, fitted_GN, z_GN, num_bits)
    s_GN, z_GN, _ = _better((s_GN, z_GN, error_GN), (fitted_GN, z_GN, tried_error))
    q_GBN = integers(w_GBN, s_GN[:, None], z_GN[:, None], num_bits)
    return q_GBN.astype(np.uint8), s_GN, z_GN.astype(np.uint8)


def _better(known: tuple[Float, ...], tried: tuple[Float, ...]) -> tuple[Float, Float, Float]:
    """Select per group the (scales, zero points, errors) of the smaller error."""
    better = tried[2] < known[2]
    scales, zeros, errors = (np.where(better, new, old) for old, new in zip(known, tried, strict=True))
    return scales, zeros, errors


def _range(w_GBN: Float, shrink: float, num_bits: int, symmetric: bool) -> tuple[Float, Float]:
    """Return scales and zero points, (G, N), of the groups' ranges, which include 0; a group of zeros has scale 1."""
    levels, middle = 2**num_bits - 1, 2 ** (num_bits - 1)
    if symmetric:
        s_GN = np.abs(w_GBN).max(1) * np.float32(shrink / (middle - 1))
        z_GN = np.full_like(s_GN, middle)
    else:
        low, high = np.minimum(w_GBN.min(1), 0), np.maximum(w_GBN.max(1), 0)
        s_GN = (high - low) * np.float32(shrink / levels)
        z_GN = np.clip(np.rint(-low * np.float32(shrink) / np.where(s_GN > 0, s_GN, 1)), 0, levels)
    return np.where(s_GN > 0, s_GN, 1).astype(np.float32), z_GN.astype(np.float32)


def _fitted(w_GBN: Float, h_GB1: Float, s_GN: Float, z_GN: Float, num_bits: int) -> Float:
    """Fit scales to integers by least squares: s = sum h (q - z) w / sum h (q - z)^2."""
    c_GBN = integers(w_GBN, s_GN[:, None], z_GN[:, None], num_bits) - z_GN[:, None]
    above, below = (h_GB1 * c_GBN * w_GBN).sum(1), (h_GB1 * c_GBN * c_GBN).sum(1)
    fits = (above > 0) & (below > 0)
    return np.where(fits, above / np.where(fits, below, 1), s_GN).astype(np.float32)


def _error(w_GBN: Float, h_GB1: Float, s_GN: Float, z_GN: Float, num_bits: int) -> Float:
    s_G1N, z_G1N = s_GN[:, None], z_GN[:, None]
    off_GBN = integers(w_GBN, s_G1N, z_G1N, num_bits)
    off_GBN -= z_G1N
    off_GBN *= s_G1N
    off_GBN -= w_GBN
    off_GBN *= off_GBN
    off_GBN *= h_GB1
    return np.asarray(off_GBN.sum(1), np.float32)
