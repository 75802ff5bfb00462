"""Shared state of the PTQ pipeline: task with effort preset, calibration data, current program, and its SQNR.

SQNR is the signal-to-quantization-noise ratio of a program's outputs.

| effort   | ranges  | equalize | bias correction | rounding      |
| fast     | minmax  | no       | no              | nearest       |
| balanced | chosen  | yes      | yes             | small_kernels |
| best     | chosen from more, then one by one | yes | yes | adaround |

A chosen range stays `auto` in the resolved params: what is tried is decided by the rounding, see `pipeline.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.requests.quantize import Effort, Static
from omgoptim.techniques.quantize._onnx.qdq import Range, write_qdq
from omgoptim.techniques.quantize._ptq.calibration import Batch, Values, outputs

MAX_SQNR_DB = 120.0
"""SQNR that is reported for outputs without noise: below that of a single rounding to float32's 24 bits, 144 dB."""


Outputs = Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]]
"""Outputs of one batch, by name or in order."""

MIN_CHOICE_GAIN_DB = 0.3
"""Minimum SQNR gain on held-out samples for equalization or another range method. Chosen: 7 % less noise power; among
several options on few samples smaller differences are chance."""

MIN_STEP_GAIN_DB = 0.05
"""Minimum SQNR gain for bias correction, rounding, or the range of one tensor. Chosen: 1 % less noise power, since they
cannot harm elsewhere."""

MIN_HELD_OUT = 32
"""Minimum number of held-out samples for choosing ranges one by one. Chosen: fewer would be overfitted."""


def sqnr_db(reference: Sequence[Outputs], actual: Sequence[Outputs], non_finite_db: float = -math.inf) -> float:
    """Return the SQNR of outputs in dB, batch by batch.

    Args:
        reference: reference outputs, batch by batch.
        actual: outputs for the same batches.
        non_finite_db: result where `actual` is not finite and `reference` is.
    """
    ratio = noise_to_signal(*([_arrays(batch) for batch in outputs] for outputs in (reference, actual)))
    return non_finite_db if math.isinf(ratio) else to_decibels(ratio)


def _arrays(outputs: Outputs) -> list[NDArray[Any]]:
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


def noise_to_signal(reference: Sequence[Sequence[NDArray[Any]]], actual: Sequence[Sequence[NDArray[Any]]]) -> float:
    """Return E[(y - y')^2] / E[y^2] of outputs, given as one list of arrays per batch: the mean over outputs.

    An output of integers is ignored, and so are positions that are not finite in `reference` (a mask). Infinite where
    `actual` is not finite and `reference` is.
    """
    ratios = []
    for index, first in enumerate(reference[0]):
        if not np.issubdtype(np.asarray(first).dtype, np.floating):
            continue
        signal = noise = 0.0
        for before, after in (
            (np.asarray(a[index]), np.asarray(b[index])) for a, b in zip(reference, actual, strict=True)
        ):
            finite = np.isfinite(before)
            expected, values = before[finite].astype(np.float64), after[finite].astype(np.float64)
            if not np.isfinite(values).all():
                return math.inf
            signal += float(np.square(expected).sum())
            noise += float(np.square(values - expected).sum())
        ratios.append(noise / signal if signal > 0 else (1.0 if noise > 0 else 0.0))
    return float(np.mean(ratios)) if ratios else 0.0


def to_decibels(noise_over_signal: float) -> float:
    """Return -10 log10 of a noise-to-signal ratio; at most `MAX_SQNR_DB`, and -inf for an infinite one."""
    if math.isinf(noise_over_signal):
        return -math.inf
    return min(MAX_SQNR_DB, -10 * math.log10(noise_over_signal)) if noise_over_signal > 0 else MAX_SQNR_DB


@dataclass(frozen=True, slots=True)
class CalibrationSplit:
    """Calibration batches, split into a fitting and a held-out part, and the float outputs on the latter."""

    fit: list[Batch]
    held_out: list[Batch]
    reference_outputs: list[Values]


@dataclass(frozen=True, slots=True)
class PtqState:
    """A float program, the ranges of its QDQ form, and their SQNR."""

    model: ModelProto
    ranges: Mapping[str, Range]
    sqnr_db: float
    reference: ModelProto
    """The program before any rounding, with its channels equalized: the reference of bias correction and rounding."""
    rounded_kernels: int = 0
    """Number of small kernels that were rounded for the least output error."""


@dataclass(frozen=True, slots=True)
class PtqTask:
    """Layers to quantize, and the parameters."""

    chosen: Sequence[OnnxLayer]
    params: Static
    """Resolved by `apply_preset`."""
    threads: int = 1
    seed: int = 0
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None
    cache: Path | None = None
    """Folder of `step_cache.py`; None: no cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PtqSettings(PtqTask):
    """A task with its calibration data."""

    data: CalibrationSplit
    macs: int | None
    """Multiply-accumulates of one sample; None where unknown."""

    def measure_sqnr(self, model: ModelProto, ranges: Mapping[str, Range]) -> float:
        """Return the SQNR of the QDQ program on the held-out samples, in dB."""
        quantized = write_qdq(model, self.chosen, ranges, self.params)
        return sqnr_db(self.data.reference_outputs, outputs(quantized, self.data.held_out, self.threads))

    def with_program(self, state: PtqState, model: ModelProto, ranges: Mapping[str, Range]) -> PtqState:
        """Return the state with another program or other ranges."""
        return replace(state, model=model, ranges=ranges, sqnr_db=self.measure_sqnr(model, ranges))

    def affordable_runs(self, macs: float, samples: int) -> float:
        """Return how many runs over `samples` samples are within a budget; infinite where their cost is unknown."""
        return macs / (self.macs * samples) if self.macs else math.inf


def apply_preset(params: Static, effort: Effort) -> Static:
    """Fill the open settings of params from the preset of an effort; explicit settings stay.

    Resolving again with balanced changes nothing, whatever the effort was.
    """
    is_fast = effort == "fast"
    filled: dict[str, object] = {}
    if params.range_method == "auto" and is_fast:
        filled["range_method"] = "minmax"
    if params.equalize is None:
        filled["equalize"] = not is_fast
    if params.bias_correction is None:
        filled["bias_correction"] = not is_fast
    if params.rounding == "auto":
        filled["rounding"] = {"fast": "nearest", "balanced": "small_kernels", "best": "adaround"}[effort]
    return params.model_copy(update=filled)
