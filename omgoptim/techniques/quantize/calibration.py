"""Calibration batches, checked and cut to size. Registers no technique."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.errors import DataError
from omgoptim.techniques.registry import ProgramRun

Batch = dict[str, NDArray[Any]]


def batches_for(model: ModelProto, run: ProgramRun, samples: int) -> list[Batch]:
    """The first `samples` calibration samples, as batches of the model's inputs only.

    Raises:
        DataError: there is none, an input is missing, or a value is NaN or infinite.
    """
    if not run.calibration:
        raise DataError(
            "static quantization needs calibration data",
            "the calibration split is empty, or no data was given",
            "give --data whose callable answers split='calibration'; scheme dynamic needs no data",
        )
    names = [value.name for value in model.graph.input]
    batches: list[Batch] = []
    left = samples
    for given in run.calibration:
        missing = [name for name in names if name not in given]
        if missing:
            raise DataError(f"a calibration batch lacks the input '{missing[0]}'", f"it has {', '.join(sorted(given))}")
        batch = {name: np.asarray(given[name])[:left] for name in names}
        size = max((len(array) for array in batch.values() if array.ndim), default=0)
        if size == 0:
            continue
        for name, array in batch.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                kind = "NaN" if np.isnan(array).any() else "an infinite value"
                raise DataError(
                    f"the calibration data of input '{name}' holds {kind}",
                    "a range read from it would be useless for every sample",
                    "clean the calibration split",
                )
        batches.append(batch)
        left -= size
        if left <= 0:
            break
    if not batches:
        raise DataError("static quantization needs calibration data", "every calibration batch is empty")
    return batches
