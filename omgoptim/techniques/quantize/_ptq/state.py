"""Shared state of the PTQ pipeline: calibration data, the current float program with its ranges, and its SQNR."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto

from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.qdq import Range, write_qdq
from omgoptim.techniques.quantize._ptq.calibration import Batch, Values, outputs
from omgoptim.techniques.quantize._ptq.sqnr import sqnr_db

MIN_CHOICE_GAIN_DB = 0.3
"""Minimum SQNR gain on held-out samples for equalization or another range method: smaller gains are noise."""

MIN_STEP_GAIN_DB = 0.05
"""Minimum SQNR gain for bias correction, rounding, or the range of one tensor, which cannot harm elsewhere."""

MIN_HELD_OUT = 32
"""Minimum number of held-out samples for choosing ranges one by one: with fewer the choice would overfit them."""


@dataclass(frozen=True, slots=True)
class CalibrationSplit:
    """Calibration batches, split into a fitting and a held-out part, and the float outputs on the latter."""

    fit: list[Batch]
    held: list[Batch]
    wanted: list[Values]


@dataclass(frozen=True, slots=True)
class PtqState:
    """A float program, the ranges of its QDQ form, and their SQNR."""

    model: ModelProto
    ranges: Mapping[str, Range]
    sqnr_db: float
    reference: ModelProto
    """The program before any rounding, with its channels equalized: the reference of bias correction and rounding."""
    rounded: int = 0
    """Number of small kernels that were rounded for the least output error."""


@dataclass(frozen=True, slots=True)
class PtqTask:
    """Layers to quantize, and the parameters."""

    chosen: Sequence[OnnxLayer]
    params: Static
    """Resolved, see `presets.py`."""
    threads: int = 1
    seed: int = 0
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None


@dataclass(frozen=True, slots=True, kw_only=True)
class PtqSettings(PtqTask):
    """A task with its calibration data."""

    data: CalibrationSplit
    macs: int | None
    """Multiply-accumulates of one sample; None where unknown."""

    def level(self, model: ModelProto, ranges: Mapping[str, Range]) -> float:
        """Return the SQNR of the QDQ program on the held-out samples, in dB."""
        quantized = write_qdq(model, self.chosen, ranges, self.params)
        return sqnr_db(self.data.wanted, outputs(quantized, self.data.held, self.threads))

    def after(self, state: PtqState, model: ModelProto, ranges: Mapping[str, Range]) -> PtqState:
        """Return the state with another program or other ranges."""
        return replace(state, model=model, ranges=ranges, sqnr_db=self.level(model, ranges))

    def evaluations(self, macs: float, samples: int) -> float:
        """Return how many runs over `samples` samples are within a budget; infinite where their cost is unknown."""
        return macs / (self.macs * samples) if self.macs else math.inf
