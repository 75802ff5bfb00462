"""GPTQ: quantize column by column and compensate the error in the remaining columns.

With the Hessian H = E[x x'] over a layer's inputs, the output error is trace(D' H D), D = the change of the weight. Row
k of the stored weight (K, N) is rounded, and the rows after it move so that this error stays least: for U upper
triangular with inverse(H) = U' U, they lose U[k, later] / U[k, k] times the error of row k.
Hessians are computed inside the program, as outputs added to a copy of it: activations never leave the engine.
Source: arXiv:2210.17323. Differs in the groups' scales, which are searched (`group_quantization.py`) on the moved
weights, and in being kept only where the Hessian of held-out samples agrees (`weight_only.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from omgoptim.errors import DataError
from omgoptim.techniques.quantize._onnx.runtime import as_technique_error, open_program
from omgoptim.techniques.quantize._ptq.group_quantization import Float, QuantizedGroups, integers, quantize_groups

DAMPING = 0.01
"""Damping, as a fraction of the mean of H's diagonal, as in arXiv:2210.17323: few samples determine some directions
badly.
"""


def gptq_quantize(w_KN: Float, h_KK: Float, group_size: int, num_bits: int, symmetric: bool) -> QuantizedGroups:
    """Quantize a weight (K, N) by GPTQ with the Hessian (K, K) of the layer's inputs.

    Raises:
        numpy.linalg.LinAlgError: the moments are no positive definite matrix.
    """
    u_KK = _factor(h_KK)
    importance_K = np.diagonal(h_KK).astype(np.float32) + np.float32(1e-12)
    left_KN = w_KN.astype(np.float64)
    rounded: list[QuantizedGroups] = []
    for start in range(0, len(w_KN), group_size):
        end = start + group_size
        block_BN, error_BN = left_KN[start:end], np.empty((group_size, w_KN.shape[1]))
        group = quantize_groups(block_BN.astype(np.float32), group_size, num_bits, symmetric, importance_K[start:end])
        s_N, z_N = group.s_GN[0].astype(np.float64), group.z_GN[0].astype(np.float64)
        q_BN = np.empty_like(group.q_KN)
        for row in range(group_size):
            k = start + row
            q_N = integers(block_BN[row], s_N, z_N, num_bits)
            error_BN[row] = (block_BN[row] - (q_N - z_N) * s_N) / u_KK[k, k]
            block_BN[row + 1 :] -= np.outer(u_KK[k, k + 1 : end], error_BN[row])
            q_BN[row] = q_N
        left_KN[end:] -= u_KK[start:end, end:].T @ error_BN
        rounded.append(QuantizedGroups(q_BN, group.s_GN, group.z_GN))
    parts = ([getattr(group, name) for group in rounded] for name in ("q_KN", "s_GN", "z_GN"))
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
"""Maximum bytes of the Hessians that one pass over the batches accumulates."""


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
    found: Hessians = {}
    waiting = list(widths)
    while waiting:
        some, size = [waiting.pop(0)], 0
        while waiting and size + 4 * widths[waiting[0]] ** 2 <= MAX_PASS_BYTES:
            size += 4 * widths[waiting[0]] ** 2
            some.append(waiting.pop(0))
        found |= _one_pass(model, {name: widths[name] for name in some}, batches, threads)
    for name, h_KK in found.items():
        if not np.isfinite(h_KK).all():
            raise DataError(
                "the calibration data holds NaN or infinity, or the model makes some of it",
                f"found in '{name}'",
                "clean the calibration split; scheme weight_only works without data too",
            )
    return found


def _one_pass(model: ModelProto, widths: Mapping[str, int], batches: Batches, threads: int) -> Hessians:
    watched = ModelProto()
    watched.CopyFrom(model)
    for index, (name, width) in enumerate(widths.items()):
        stem = f"omgoptim_moments_{index}"
        shape = numpy_helper.from_array(np.array([-1, width], np.int64), f"{stem}_shape")
        watched.graph.initializer.append(shape)
        watched.graph.node.extend(
            [
                helper.make_node("Reshape", [name, shape.name], [f"{stem}_rows"], f"{stem}_rows"),
                helper.make_node("Transpose", [f"{stem}_rows"], [f"{stem}_columns"], f"{stem}_columns", perm=[1, 0]),
                helper.make_node("MatMul", [f"{stem}_columns", f"{stem}_rows"], [stem], stem),
            ]
        )
        watched.graph.output.append(helper.make_tensor_value_info(stem, TensorProto.FLOAT, [width, width]))
    names = [value.name for value in model.graph.input]
    outputs = [f"omgoptim_moments_{index}" for index in range(len(widths))]
    session = open_program(watched, threads)
    sums = [np.zeros((width, width), np.float32) for width in widths.values()]
    with as_technique_error("the program does not run on the calibration data"):
        for batch in batches:
            for total, part in zip(sums, session.run(outputs, {name: batch[name] for name in names}), strict=True):
                total += part
    return dict(zip(widths, sums, strict=True))
