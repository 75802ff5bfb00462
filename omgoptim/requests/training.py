"""What may be asked of the one training loop: the arguments that every verb which trains shares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from omgoptim.requests.base import ModelRequest, Request


class TrainingFields(Request):
    """How a module is trained: what every verb that trains asks, and every technique that does."""

    epochs: int | None = Field(None, ge=0, le=10_000)
    """Training epochs (after each round, where there are rounds); default: 1 with training data, else 0."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; default: what suits the optimizer, lower for a training of fewer than 100 steps."""
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    """Optimizer; sgd has momentum 0.9."""
    lr_schedule: Literal["cosine", "linear", "constant", "one_cycle"] = "cosine"
    """How the learning rate falls over the steps."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay; biases and normalization are left out."""
    train_batch: int | None = Field(None, ge=1, le=65_536)
    """Batch size of training, where the data is a Dataset or arrays; a DataLoader keeps its own; default: 64, fewer (8 or more) where an epoch would have fewer than 8 steps."""  # noqa: E501
    accumulate: int = Field(1, ge=1, le=4096)
    """Batches whose gradients make one step."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0: not clipped."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward and backward pass; weights stay in float32."""
    patience: int = Field(0, ge=0)
    """Stop after so many epochs without better quality on the selection samples; 0: never."""
    loss: str = "auto"
    """auto (cross-entropy, mean squared error, or the model's own loss), or file.py:callable = loss(outputs, targets)."""  # noqa: E501
    temperature: float = Field(4.0, gt=0)
    """Temperature of the softened outputs."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the loss on the targets; 1 - alpha is that of the original's outputs."""


class TrainingRequest(TrainingFields, ModelRequest):
    """A verb that trains: fine-tuning after pruning or factorizing, distillation."""


class RecoveryRequest(TrainingRequest):
    """A verb that changes a model and then trains it back."""

    recover: Literal["full", "lora", "none"] = "full"
    """What is trained: every weight, low-rank adapters that are merged afterwards (less memory while training), nothing."""  # noqa: E501
    lora_rank: int = Field(8, ge=1)
    """Rank of the adapters."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    distill: bool = True
    """Learn from the original model's outputs too; without targets, from them alone."""
