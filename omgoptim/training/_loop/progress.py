"""Progress reports of a running training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Progress = Callable[[str, "float | None"], None]
"""`progress(stage, fraction of this training)`."""


@dataclass(slots=True)
class ProgressReporter:
    """Progress reporter of one epoch: at most one message a second, with the loss and the time left."""

    progress: Progress
    epochs: int
    epoch: int
    count: int
    started: float = field(default_factory=time.perf_counter)
    last: float = 0.0

    def __call__(self, done: int, loss: float) -> None:
        now = time.perf_counter()
        if done < self.count and now - self.last < 1.0:
            return
        self.last = now
        fraction = min(done / max(self.count, 1), 1.0)
        eta = (now - self.started) / max(fraction, 1e-9) * (self.epochs - self.epoch + 1 - fraction)
        text = f"training: epoch {self.epoch} of {self.epochs}, loss {loss:.4g}, eta {eta:.0f} s"
        self.progress(text, (self.epoch - 1 + fraction) / self.epochs)
