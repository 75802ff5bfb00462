"""Rounds of compression, epochs of training, and steps of a run with a goal."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class Round(Record):
    """A round of compression and fine-tuning. Qualities are those on the selection samples."""

    number: int
    amount: float | None = None
    """Target of the round: sparsity, ratio of channels, or fraction of parameters removed, 0..1."""
    params: int | None = None
    nonzero_params: int | None = None
    macs: int | None = None
    speedup: float | None = None
    """Latency of the original over this round's, one launch; only with a speed target."""
    quality_taken: float | None = None
    """Quality right after the compression."""
    quality_reestimated: float | None = None
    """Quality after re-estimation of batch-norm statistics on training inputs without labels; undone where it was
    worse.
    """
    quality_trained: float | None = None
    """Quality after training; null where there was none."""
    quality_drop: float | None = None
    """Quality of the original on the same samples, minus the last of these."""
    kept: bool = False
    """True if this round's model is the artifact."""
    why: str = ""


class Epoch(Record):
    """An epoch of training."""

    round: int = 1
    epoch: int
    loss: float | None
    """Mean loss over the epoch's batches; null if it was not finite."""
    quality: float | None = None
    """Quality on the selection samples."""
    learning_rate: float
    seconds: float
    best: bool = False
    """True if the epoch's weights were kept."""


class Training(Record):
    """Settings and record of a training."""

    epochs: list[Epoch]
    optimizer: str
    loss: str
    """Description of the minimized loss."""
    trained_params: int
    """Trained parameters: all of them, or the adapters'."""
    total_params: int
    metric: str | None = None
    seconds: float
    resumed: int = 0
    """Number of times that training was resumed from a checkpoint."""
    stopped: str | None = None
    """Reason for an early end: patience, or a loss that was not finite."""
    teacher_outputs: str | None = None
    """Source of the teacher's outputs: cached, or computed for every batch; null without a teacher."""


class Control(Record):
    """Ablation: the same student, trained equally long on the same batches, without the teacher."""

    quality: float | None
    """Quality on the evaluation data, from the control's own reopened artifact."""
    gain: float | None = None
    """Effect of distillation: quality of the distilled student minus that of the control, on the same samples."""
    gain_low: float | None = None
    """Lower end of its 95 % interval."""
    gain_high: float | None = None
    """Upper end of its 95 % interval."""
    kept: bool = False
    """True if the control is the artifact: it was better on the selection samples."""
    training: Training | None = None


class SensitivityPoint(Record):
    """Quality with only this layer or group compressed by an amount, on the selection samples."""

    path: str
    amount: float
    """Fraction removed, 0..1."""
    quality: float
    quality_drop: float


class Step(Record):
    """A step: its call, expected and measured effect, and whether the result builds on it."""

    name: str
    """Such as `quantize` or `prune 50%`."""
    verb: str
    run_id: str | None = None
    """Run of the step: `runs show` has its report."""
    parent: str | None = None
    """Name of the step whose artifact it starts from; null for the original."""
    status: Literal["kept", "rolled_back", "failed", "planned", "skipped"]
    why: str = ""
    seconds: float | None = None
    expected_seconds: float | None = None
    """Estimated seconds of a planned step, from one measured launch and one measured training batch."""
    expected_speedup: float | None = None
    """Expected speedup over the original."""
    speedup: float | None = None
    """Latency of the original over that of the step's artifact: from one launch, the product along the chain."""
    size_bytes: int | None = None
    quality: float | None = None
    quality_drop: float | None = None
    """Quality drop against the original, on the selection samples; never on the evaluation data."""
    on_front: bool = False
    """True if the step is on the Pareto front of speed, size and quality drop."""
