"""What a quantization changed, what it cost layer by layer, and what was kept in float."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class LayerPrecision(Record):
    """What became of one layer with weights, read off both programs and off what the engine says that it runs."""

    path: str
    op: str
    """The operator before."""
    op_after: str
    """The operator after; the same where it was not replaced."""
    shape: list[int]
    """Of the (largest) weight."""
    dtype: str
    """What the weight was stored in."""
    dtype_after: str
    bytes: int
    """Of the weights with their scales and zero points."""
    bytes_after: int
    computed_in: str | None = None
    """What the engine computes it in: int8, bfloat16, float16, float32; null where the engine does not report it."""
    reason: str | None = None
    """Why it was left as it is; null if it was changed."""


class Coverage(Record):
    """Proof of what a quantization changed, from the artifact and the engine that runs it."""

    verdict: Literal["REAL", "SIMULATED", "NO-OP"]
    """REAL: weights are stored in fewer bits, and what is said to be computed in integers is. SIMULATED: integers are
    stored or rounded to, and the engine computes in float although integer arithmetic was the aim. NO-OP: no layer."""
    why: str
    """One sentence."""
    changed: int
    """Layers whose weights are stored in fewer bits."""
    total: int
    """Layers with weights."""
    integer: int | None = None
    """Layers that the engine computes in integers; null where it does not report them."""
    weight_share: float
    """Of the bytes of all weights before, those of changed layers, 0..1."""
    layers: list[LayerPrecision] = []


class LayerNoise(Record):
    """How much one layer's quantization disturbs the model's output, on samples that are not evaluation data."""

    path: str
    kind: str
    sqnr_db: float
    """Signal-to-quantization-noise of the output with only this layer quantized, in dB: the lower, the worse."""
    sqnr_gain_db: float | None = None
    """How much that of the whole quantized model rises with only this layer back in float."""
    recovered: float | None = None
    """Quality that the quantized model gets back with this layer in float; only of the worst few layers."""
    bytes: int
    """Of its float weights: what keeping it in float costs."""


class Finding(Record):
    """Something that is known to hurt quality or speed, found in this model, and what undoing it brought."""

    name: str
    """For instance `spread channels`, `activation outliers`, `mask fill`."""
    paths: list[str]
    """Layers where it was found, the worst first."""
    evidence: str
    """What was measured, with numbers."""
    fix: str
    """What helps."""
    recovered: float | None = None
    """Quality that it brought back, measured on samples that are not evaluation data; null where it was not tried."""


class TimeShare(Record):
    """A kind of layer and its part of the time of one call."""

    kind: str
    time_ms: float
    share: float
    quantized: bool
    """Whether it computes in integers."""


class Explanation(Record):
    """Why quality fell, and why it is not faster."""

    summary: str
    """A few sentences."""
    metric: str
    samples: int
    """On which qualities here were measured."""
    sqnr_db: float | None = None
    """Signal-to-quantization-noise of the quantized model's output."""
    layers: list[LayerNoise] = []
    """The most sensitive first."""
    findings: list[Finding] = []
    times: list[TimeShare] = []
    """Of the artifact, the costliest kind first."""
    speedup_bound: float | None = None
    """Amdahl: how much faster the artifact could still become if its quantized part took no time."""


class Guard(Record):
    """The search for the layers to keep in float so that the guard holds. Qualities come from selection samples."""

    kept_in_float: list[str]
    """Paths of the layers that were kept in float."""
    float_bytes: int
    """Bytes of their weights."""
    evaluations: int
    """Full evaluations that it took, each of a candidate on all selection samples."""
    quality_drop: float
    """Of the candidate it ended with."""
    samples: int | None = None
    """On how many selection samples that was read."""
    holds: bool
    seconds: float
    stopped: str | None = None
    """Why it ended early: its time, or that more layers in float could not pay."""
    out_of_time: bool = False
    why: str
    """One sentence: what was bound by what."""
