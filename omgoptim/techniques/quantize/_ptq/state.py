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
"""What the held-out samples must gain for anything but the program as it is and its plain ranges: less is chance."""

MIN_STEP_GAIN_DB = 0.05
"""The same for a step that can do no harm elsewhere, and for the range of one tensor."""

MIN_HELD_OUT = 32
"""Held-out samples from which on ranges are chosen one by one: fewer would be fitted, not judged by."""


@dataclass(frozen=True, slots=True)
class CalibrationSplit:
    """The calibration batches in their two parts, and the float program's outputs on the second."""

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
    """The program before any rounding, with its channels scaled: what biases and rounding are compared with."""
    rounded: int = 0
    """Small kernels that were rounded for their outputs."""


@dataclass(frozen=True, slots=True)
class PtqTask:
    """Layers to quantize, and how."""

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
    """Multiply-accumulates of one sample; None: unknown."""

    def level(self, model: ModelProto, ranges: Mapping[str, Range]) -> float:
        """Return the SQNR of the QDQ program on the held-out samples, in dB."""
        quantized = write_qdq(model, self.chosen, ranges, self.params)
        return sqnr_db(self.data.wanted, outputs(quantized, self.data.held, self.threads))

    def after(self, state: PtqState, model: ModelProto, ranges: Mapping[str, Range]) -> PtqState:
        """Return the state with another program or other ranges."""
        return replace(state, model=model, ranges=ranges, sqnr_db=self.level(model, ranges))

    def evaluations(self, macs: float, samples: int) -> float:
        """Runs over `samples` samples that are within a budget; infinite where the cost of a run is unknown."""
        return macs / (self.macs * samples) if self.macs else math.inf
