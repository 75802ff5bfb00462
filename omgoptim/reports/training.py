"""What was taken away and trained, round by round and epoch by epoch."""

from __future__ import annotations

from omgoptim.reports.base import Record


class Round(Record):
    """One round of taking away and training back. Qualities come from the selection samples, never from evaluation."""

    number: int
    amount: float | None = None
    """What the round was to reach: sparsity, ratio of channels, or parameters left out, 0..1."""
    params: int | None = None
    nonzero_params: int | None = None
    macs: int | None = None
    speedup: float | None = None
    """Latency of the original over this one's, one launch; only where a speed is the goal."""
    quality_taken: float | None = None
    """Right after weights were taken away."""
    quality_reestimated: float | None = None
    """After the statistics of batch normalization were estimated again, on training inputs without labels; undone where
    that was worse."""
    quality_trained: float | None = None
    """After training; null where there was none."""
    quality_drop: float | None = None
    """The original's quality on the same samples, minus the last of these."""
    kept: bool = False
    """Whether this round's model is the artifact."""
    why: str = ""


class Epoch(Record):
    """One epoch of training."""

    round: int = 1
    epoch: int
    loss: float | None
    """Mean over the epoch's batches; null if it was no number."""
    quality: float | None = None
    """On the selection samples."""
    learning_rate: float
    seconds: float
    best: bool = False
    """Whether its weights were kept."""


class Training(Record):
    """What was trained, how, and how it went."""

    epochs: list[Epoch]
    optimizer: str
    loss: str
    """What was minimized, in words."""
    trained_params: int
    """Parameters that had a gradient: all of them, or the adapters'."""
    total_params: int
    metric: str | None = None
    seconds: float
    resumed: int = 0
    """How often training went on from a checkpoint."""
    stopped: str | None = None
    """Why it ended before its last epoch: patience, or a loss that was no number."""
    teacher_outputs: str | None = None
    """Whether the teacher's outputs were computed once and kept, or for every batch, in words; null without one."""


class Control(Record):
    """The same student, trained as long from the same weights on the same batches, without the teacher."""

    quality: float | None
    """On the evaluation data, from the control's own reopened artifact."""
    gain: float | None = None
    """What the teacher brought: quality of the distilled student minus that of the control, on the same samples."""
    gain_low: float | None = None
    gain_high: float | None = None
    """Ends of a 95 % interval."""
    kept: bool = False
    """Whether the control is the artifact: it was better on the selection samples."""
    training: Training | None = None


class SensitivityPoint(Record):
    """Quality when only this layer or group is compressed, by so much; on the selection samples."""

    path: str
    amount: float
    """Fraction taken away, 0..1."""
    quality: float
    quality_drop: float
