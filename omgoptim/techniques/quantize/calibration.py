"""Calibration batches, checked and cut to size. Registers no technique."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.errors import DataError, argument
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
            f"give {argument('data', 'file.py:callable')} that answers split='calibration'; "
            "scheme dynamic needs no data",
        )
    names = [value.name for value in model.graph.input]
    batches: list[Batch] = []
    left = samples
    for given in run.calibration:
        missing = [name for name in names if name not in given]
        if missing:
            raise DataError(f"a calibration batch lacks the input '{missing[0]}'", f"it has {', '.join(sorted(given))}")
        batch = {name: np.asarray(given[name])[:left] for name in names}
        size = size_of(batch)
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


def size_of(batch: Batch) -> int:
    """Samples of a batch: the length of its longest input; an input without dimensions counts for nothing."""
    return max((len(array) for array in batch.values() if array.ndim), default=0)


def evenly(batches: Sequence[Batch], samples: int, *, sliceable: bool = True) -> list[Batch]:
    """About `samples` of the samples, every n-th of each batch; batches that cannot be cut are taken whole."""
    step = max(1, sum(map(size_of, batches)) // samples)
    cut = sliceable and all(
        array.ndim and len(array) == size_of(batch) for batch in batches for array in batch.values()
    )
    if not cut:
        return list(batches[::step])
    return [{name: array[::step] for name, array in batch.items()} for batch in batches]


def split(batches: Sequence[Batch], every: int = 4, *, sliceable: bool = True) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit to and batches to choose by: every `every`-th sample is held out.

    Args:
        sliceable: whether the program takes batches of any size; if not, whole batches are held out.

    Returns:
        Both, disjoint; the same batches twice if there is only one to give.
    """
    if sliceable and all(array.ndim and len(array) == size_of(batch) for batch in batches for array in batch.values()):
        fit: list[Batch] = []
        held: list[Batch] = []
        seen = 0
        for batch in batches:
            out = (np.arange(seen, seen + size_of(batch)) % every) == every - 1
            if seen == 0 and size_of(batch) and sum(map(size_of, batches)) in range(2, every):
                out[-1] = True  # fewer samples than a turn: the last of the first batch
            seen += size_of(batch)
            for rows, part in ((~out, fit), (out, held)):
                if rows.any():
                    part.append({name: array[rows] for name, array in batch.items()})
    else:
        held = list(batches[every - 1 :: every]) or list(batches[1:][-1:])
        fit = [batch for batch in batches if not any(batch is other for other in held)]
    return (fit, held) if fit and held else (list(batches), list(batches))
