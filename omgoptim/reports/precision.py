"""Effects of a quantization: changed layers, their noise, and layers kept in float."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class LayerPrecision(Record):
    """Precision of one layer with weights, from both programs and from the engine's report on its kernels."""

    path: str
    op: str
    """The operator before."""
    op_after: str
    """The operator after; the same where it was not replaced."""
    shape: list[int]
    """Shape of the (largest) weight."""
    dtype: str
    """Storage dtype of the weight."""
    dtype_after: str
    bytes: int
    """Bytes of the weights with their scales and zero points."""
    bytes_after: int
    computed_in: str | None = None
    """Compute dtype in the engine: int8, bfloat16, float16, float32; null where the engine does not report it."""
    reason: str | None = None
    """Reason for leaving it unchanged; null if it was changed."""


class Coverage(Record):
    """Coverage of a quantization, verified on the artifact and on the engine that runs it."""

    verdict: Literal["REAL", "SIMULATED", "NO-OP"]
    """REAL: weights are stored in fewer bits, and layers reported as integer are computed in integers. SIMULATED:
    weights are stored as or rounded to integers, but the engine computes in float although the scheme is for integer
    arithmetic. NO-OP: no layer is quantized.
    """
    why: str
    """One sentence."""
    changed: int
    """Layers whose weights are stored in fewer bits."""
    total: int
    """Layers with weights."""
    integer: int | None = None
    """Layers that the engine computes in integers; null where it does not report them."""
    weight_share: float
    """Share of all weights' bytes before that belongs to changed layers, 0..1."""
    layers: list[LayerPrecision] = []


class LayerNoise(Record):
    """Effect of one layer's quantization on the model's output, on samples that are not evaluation data."""

    path: str
    kind: str
    sqnr_db: float
    """SQNR of the output with only this layer quantized, in dB: the lower, the worse."""
    sqnr_gain_db: float | None = None
    """Gain of the quantized model's SQNR with only this layer in float, in dB."""
    recovered: float | None = None
    """Quality that the quantized model regains with this layer in float; measured for the worst layers only."""
    bytes: int
    """Bytes of its float weights: the cost of keeping it in float."""


class Finding(Record):
    """A known cause of lost quality or speed, found in this model, and the effect of removing it."""

    name: str
    """Kind of cause, for instance `spread channels`, `activation outliers`, `mask fill`."""
    paths: list[str]
    """Affected layers, the worst first."""
    evidence: str
    """Measured values."""
    fix: str
    """Remedy."""
    recovered: float | None = None
    """Regained quality, measured on samples that are not evaluation data; null where it was not tried."""


class TimeShare(Record):
    """A kind of layer and its share of the time of one call."""

    kind: str
    time_ms: float
    share: float
    quantized: bool
    """True if it computes in integers."""


class Explanation(Record):
    """Causes of the quality loss, and of the speed."""

    summary: str
    """A few sentences."""
    metric: str
    samples: int
    """Samples on which the qualities here were measured."""
    sqnr_db: float | None = None
    """SQNR of the quantized model's output, in dB."""
    layers: list[LayerNoise] = []
    """Sensitivity of layers, the most sensitive first."""
    findings: list[Finding] = []
    times: list[TimeShare] = []
    """Time of the artifact by kind of layer, the costliest first."""
    speedup_bound: float | None = None
    """Amdahl bound: further speedup of the artifact if its quantized part took no time."""


class Guard(Record):
    """Mixed-precision search for the layers to keep in float. Qualities are those on the selection samples."""

    kept_in_float: list[str]
    """Paths of the layers that were kept in float."""
    float_bytes: int
    """Bytes of these layers' float weights."""
    evaluations: int
    """Number of full evaluations, each of a candidate on all selection samples."""
    quality_drop: float
    """Quality drop of the resulting candidate."""
    samples: int | None = None
    """Number of selection samples."""
    holds: bool
    seconds: float
    stopped: str | None = None
    """Reason for an early end: its time limit, or that more layers in float are not worthwhile."""
    out_of_time: bool = False
    why: str
    """One sentence on the result."""
