"""Second moments of what flows into layers, E[x x'], computed inside the program. Registers no technique.

The products are outputs added to a copy of the program, so that activations never leave the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from omgoptim.errors import DataError
from omgoptim.techniques.quantize.activations import open_program
from omgoptim.techniques.quantize.onnx_file import as_technique_error

Batches = Sequence[Mapping[str, NDArray[Any]]]
Moments = dict[str, NDArray[np.float32]]

AT_ONCE_BYTES = 2**28
"""Moments that one pass over the batches may hold."""


def input_moments(model: ModelProto, widths: Mapping[str, int], batches: Batches, threads: int) -> Moments:
    """Sum of x x' over every position of every sample.

    Args:
        widths: tensor name to the size K of its last axis.
        batches: inputs of the program by name.

    Returns:
        Tensor name to (K, K).

    Raises:
        DataError: an input, or what the model makes of it, holds NaN or infinity.
        TechniqueError: the program does not run on the batches.
    """
    found: Moments = {}
    waiting = list(widths)
    while waiting:
        some, size = [waiting.pop(0)], 0
        while waiting and size + 4 * widths[waiting[0]] ** 2 <= AT_ONCE_BYTES:
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


def _one_pass(model: ModelProto, widths: Mapping[str, int], batches: Batches, threads: int) -> Moments:
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
