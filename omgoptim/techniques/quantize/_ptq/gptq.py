"""GPTQ and quantization in groups that share a scale, with the scales of least squared error.

    w_KN ~ (q_KN - z_GN) * s_GN,   group g of column n = rows g * B .. g * B + B - 1

A group's range is not just its smallest and largest weight: with 16 levels, cutting one outlier off often costs less
than the coarser step for all the others. A few shrunk ranges are tried for every group, and the scale of the best is
fitted to its integers by least squares.

GPTQ: with the Hessian H = E[x x'] over a layer's inputs, the output error is trace(D' H D), D = the change of the
weight. Row k of the stored weight (K, N) is rounded, and the rows after it move so that this error stays least: for U
upper triangular with inverse(H) = U' U, they lose U[k, later] / U[k, k] times the error of row k. Hessians are computed
inside the program, as outputs added to a copy of it: activations never leave the engine.
Source: arXiv:2210.17323. Differs in the groups' scales, which are searched on the moved weights, and in being kept only
where the Hessian of held-out samples agrees (`weight_only.py`).

Legend: K inputs, N outputs, B weights of a group, G = K / B groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from omgoptim.errors import DataError
from omgoptim.techniques.quantize._onnx.program import as_technique_error, open_program
from omgoptim.techniques.reconstruction.inputs import chunks_by_size

Float = NDArray[np.float32]

Bytes = NDArray[np.uint8]

CLIP_RATIOS: dict[int, tuple[float, ...]] = {4: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 8: ()}
"""Clipping ratios of a group's range that are tried besides 1, by bits: steps of 1/20 as in AWQ's code (llm-awq,
auto_clip.py, `n_grid`), which goes on to 0.55. With 256 levels rounding is fine enough and nothing is clipped."""

CHUNK = 2**17
"""Weights per chunk. Chosen: the temporary arrays of the search fit the processor's cache."""

DAMPING = 0.01
"""Damping, as a fraction of the mean of H's diagonal, as in arXiv:2210.17323: few samples determine some directions
badly.
"""


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
        _quantize_chunk(
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


def _quantize_chunk(w_GBN: Float, h_GB1: Float, num_bits: int, symmetric: bool) -> tuple[Bytes, Float, Bytes]:
    s_GN, z_GN = _range(w_GBN, 1.0, num_bits, symmetric)
    error_GN = _error(w_GBN, h_GB1, s_GN, z_GN, num_bits)
    for shrink in CLIP_RATIOS[num_bits]:
        tried = _range(w_GBN, shrink, num_bits, symmetric)
        s_GN, z_GN, error_GN = _select_better((s_GN, z_GN, error_GN), (*tried, _error(w_GBN, h_GB1, *tried, num_bits)))
    fitted_GN = _fitted_scales(w_GBN, h_GB1, s_GN, z_GN, num_bits)
    tried_error = _error(w_GBN, h_GB1, fitted_GN, z_GN, num_bits)
    s_GN, z_GN, _ = _select_better((s_GN, z_GN, error_GN), (fitted_GN, z_GN, tried_error))
    q_GBN = integers(w_GBN, s_GN[:, None], z_GN[:, None], num_bits)
    return q_GBN.astype(np.uint8), s_GN, z_GN.astype(np.uint8)


def _select_better(known: tuple[Float, ...], tried: tuple[Float, ...]) -> tuple[Float, Float, Float]:
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


def _fitted_scales(w_GBN: Float, h_GB1: Float, s_GN: Float, z_GN: Float, num_bits: int) -> Float:
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


def gptq_quantize(w_KN: Float, h_KK: Float, group_size: int, num_bits: int, symmetric: bool) -> QuantizedGroups:
    """Quantize a weight (K, N) by GPTQ with the Hessian (K, K) of the layer's inputs.

    Raises:
        numpy.linalg.LinAlgError: the moments are no positive definite matrix.
    """
    u_KK = _factor(h_KK)
    importance_K = np.diagonal(h_KK).astype(np.float32) + np.float32(1e-12)
    remaining_KN = w_KN.astype(np.float64)
    groups: list[QuantizedGroups] = []
    for start in range(0, len(w_KN), group_size):
        end = start + group_size
        block_BN, error_BN = remaining_KN[start:end], np.empty((group_size, w_KN.shape[1]))
        group = quantize_groups(block_BN.astype(np.float32), group_size, num_bits, symmetric, importance_K[start:end])
        s_N, z_N = group.s_GN[0].astype(np.float64), group.z_GN[0].astype(np.float64)
        q_BN = np.empty_like(group.q_KN)
        for row in range(group_size):
            k = start + row
            q_N = integers(block_BN[row], s_N, z_N, num_bits)
            error_BN[row] = (block_BN[row] - (q_N - z_N) * s_N) / u_KK[k, k]
            block_BN[row + 1 :] -= np.outer(u_KK[k, k + 1 : end], error_BN[row])
            q_BN[row] = q_N
        remaining_KN[end:] -= u_KK[start:end, end:].T @ error_BN
        groups.append(QuantizedGroups(q_BN, group.s_GN, group.z_GN))
    parts = ([getattr(group, name) for group in groups] for name in ("q_KN", "s_GN", "z_GN"))
    return QuantizedGroups(*(np.concatenate(part) for part in parts))


def output_error(w_KN: Float, groups: QuantizedGroups, h_KK: Float) -> float:
    """Return the mean squared error of the layer's output, summed over outputs: trace(D' H D)."""
    off_KN = groups.weight() - w_KN
    return float((off_KN * (h_KK @ off_KN)).sum())


def _factor(h_KK: Float) -> NDArray[np.float64]:
    """Return U, upper triangular, with inverse(H) = U' U; an input that is always 0 is independent of all others."""
    damped = h_KK.astype(np.float64)
    diagonal = np.diagonal(damped)
    added = DAMPING * diagonal.mean() + 1e-12
    damped[np.diag_indices_from(damped)] = np.where(diagonal > 0, diagonal, diagonal.mean() + 1e-12) + added
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float64)


Batches = Sequence[Mapping[str, NDArray[Any]]]

Hessians = dict[str, NDArray[np.float32]]

MAX_PASS_BYTES = 2**28
"""Maximum bytes of the Hessians that one pass over the batches accumulates. Chosen: more memory, fewer passes."""


def input_hessians(model: ModelProto, widths: Mapping[str, int], batches: Batches, threads: int) -> Hessians:
    """Return the sum of x x' over every position of every sample.

    Args:
        model: the float program.
        widths: tensor name to the size K of its last axis.
        batches: inputs of the program by name.
        threads: of ONNX Runtime.

    Returns:
        Tensor name to (K, K).

    Raises:
        DataError: an input, or what the model makes of it, holds NaN or infinity.
        TechniqueError: the program does not run on the batches.
    """
    hessians: Hessians = {}
    for names in chunks_by_size(widths, lambda name: 4 * widths[name] ** 2, MAX_PASS_BYTES):
        hessians |= _one_pass(model, {name: widths[name] for name in names}, batches, threads)
    for name, h_KK in hessians.items():
        if not np.isfinite(h_KK).all():
            raise DataError(
                "activations contain NaN or infinity on the calibration data",
                f"first found in tensor '{name}'",
                "fix the calibration split; weight_only also works without data",
            )
    return hessians


def _one_pass(model: ModelProto, widths: Mapping[str, int], batches: Batches, threads: int) -> Hessians:
    copy = deepcopy(model)
    for index, (name, width) in enumerate(widths.items()):
        stem = f"omgoptim_moments_{index}"
        shape = numpy_helper.from_array(np.array([-1, width], np.int64), f"{stem}_shape")
        copy.graph.initializer.append(shape)
        copy.graph.node.extend(
            [
                helper.make_node("Reshape", [name, shape.name], [f"{stem}_rows"], f"{stem}_rows"),
                helper.make_node("Transpose", [f"{stem}_rows"], [f"{stem}_columns"], f"{stem}_columns", perm=[1, 0]),
                helper.make_node("MatMul", [f"{stem}_columns", f"{stem}_rows"], [stem], stem),
            ]
        )
        copy.graph.output.append(helper.make_tensor_value_info(stem, TensorProto.FLOAT, [width, width]))
    names = [value.name for value in model.graph.input]
    outputs = [f"omgoptim_moments_{index}" for index in range(len(widths))]
    session = open_program(copy, threads)
    sums = [np.zeros((width, width), np.float32) for width in widths.values()]
    with as_technique_error("the program does not run on the calibration data"):
        for batch in batches:
            for total, part in zip(sums, session.run(outputs, {name: batch[name] for name in names}), strict=True):
                total += part
    return dict(zip(widths, sums, strict=True))
