"""Training configuration as plain values: a request with its defaults filled in. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omgoptim.requests.training import TrainingRequest

Optimizer = Literal["adamw", "adam", "sgd", "rmsprop"]
Schedule = Literal["cosine", "linear", "constant", "one_cycle"]
Precision = Literal["no", "bf16", "fp16"]

LEARNING_RATES: dict[Optimizer, float] = {"adamw": 1e-3, "adam": 1e-3, "sgd": 1e-2, "rmsprop": 3e-4}
"""Default peak learning rates for the recovery of a compressed network; sgd's is for momentum 0.9."""

BATCH = 64
"""Default batch size with enough data; `small_data` lowers it for few samples."""


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Hyperparameters of one training."""

    epochs: int = 1
    learning_rate: float = LEARNING_RATES["adamw"]
    """Peak learning rate, after warmup."""
    optimizer: Optimizer = "adamw"
    lr_schedule: Schedule = "cosine"
    warmup: float = 0.05
    """Warmup steps as a fraction of all steps, 0..1."""
    weight_decay: float = 0.01
    """Weight decay, applied to weights of two or more dimensions."""
    accumulate: int = 1
    """Batches per optimizer step; the last step of an epoch may have fewer."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    mixed_precision: Precision = "no"
    patience: int = 0
    """Epochs without better quality after which training stops; 0: never."""
    batch: int = BATCH
    seed: int = 0
    device: str = "cpu"

    @staticmethod
    def of(request: TrainingRequest, epochs: int, device: str, seed: int) -> TrainingConfig:
        """Return the config of a request."""
        return TrainingConfig(
            epochs=epochs,
            learning_rate=request.learning_rate or LEARNING_RATES[request.optimizer],
            optimizer=request.optimizer,
            lr_schedule=request.lr_schedule,
            warmup=request.warmup,
            weight_decay=request.weight_decay,
            accumulate=request.accumulate,
            clip_norm=request.clip_norm,
            mixed_precision=request.mixed_precision,
            patience=request.patience,
            batch=request.train_batch or BATCH,
            seed=seed,
            device=device,
        )

    @property
    def words(self) -> str:
        """Return the optimizer with its settings, as "adamw, learning rate 0.001, cosine"."""
        parts = [self.optimizer, f"learning rate {self.learning_rate:.3g}", self.lr_schedule]
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} batches a step")
        if self.mixed_precision != "no":
            parts.append(f"{self.mixed_precision} mixed precision")
        return ", ".join(parts)
