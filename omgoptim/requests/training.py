"""Common arguments of verbs that train, and of verbs whose work runs elsewhere: processes, a Ray cluster, a Ray job."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from omgoptim.errors import RequestError, argument
from omgoptim.requests.base import RARE, ModelRequest, Request, Short


class TrainingFields(Request):
    """Training settings of verbs and techniques that train."""

    epochs: int | None = Field(None, ge=0, le=10_000)
    """Training epochs (per round, if there are rounds); default: 1 with training data, else 0."""
    learning_rate: Annotated[float | None, RARE] = Field(None, gt=0)
    """Peak learning rate; default: depends on the optimizer, lower if there are fewer than 100 steps."""
    optimizer: Annotated[Literal["adamw", "adam", "sgd", "rmsprop"], RARE] = "adamw"
    """Optimizer; sgd has momentum 0.9."""
    lr_schedule: Annotated[Literal["cosine", "linear", "constant", "one_cycle"], RARE] = "cosine"
    """Learning rate schedule."""
    warmup: Annotated[float, RARE] = Field(0.05, ge=0, lt=1)
    """Fraction of the steps used for learning rate warmup."""
    weight_decay: Annotated[float, RARE] = Field(0.01, ge=0)
    """Weight decay; not applied to biases and normalization layers."""
    train_batch: Annotated[int | None, RARE] = Field(None, ge=1, le=65_536)
    """Training batch size for a Dataset or arrays (a DataLoader keeps its own); default: 64, down to 8 if an epoch would have fewer than 8 steps."""  # noqa: E501
    accumulate: Annotated[int, RARE] = Field(1, ge=1, le=4096)
    """Gradient accumulation: batches per optimizer step."""
    clip_norm: Annotated[float, RARE] = Field(1.0, ge=0)
    """Maximum gradient norm; 0: no clipping."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], RARE] = "no"
    """Autocast type of the forward and backward pass; master weights stay in float32."""
    patience: Annotated[int, RARE] = Field(0, ge=0)
    """Early stopping: epochs without improvement on the selection samples; 0: off."""
    loss: Annotated[str, RARE] = "auto"
    """Training loss: auto (cross-entropy, mean squared error, or the model's own), or file.py:callable = loss(outputs, targets)."""  # noqa: E501
    temperature: Annotated[float, RARE] = Field(4.0, gt=0)
    """Softmax temperature of the distillation loss."""
    alpha: Annotated[float, RARE] = Field(0.5, ge=0, le=1)
    """Weight of the loss on the targets; the distillation loss has weight 1 - alpha."""


class TrainingRequest(TrainingFields, ModelRequest):
    """Base of the requests that train: fine-tuning, distillation."""


class RecoveryRequest(TrainingRequest):
    """Base of the requests that compress a model and fine-tune it."""

    recover: Annotated[
        Literal["full", "lora", "none"], Short("Fine-tune all weights, LoRA (merged afterwards), or nothing.")
    ] = "full"
    """Fine-tuning: all weights (full), LoRA adapters that are merged afterwards (less memory while training), or none."""  # noqa: E501
    lora_rank: Annotated[int, RARE] = Field(8, ge=1)
    """Rank of the LoRA adapters."""
    lora_alpha: Annotated[float, RARE] = Field(16.0, gt=0)
    """LoRA alpha: the adapter product is scaled by alpha / rank."""
    distill: bool = True
    """Use the original model as a teacher; without targets, its outputs are the only loss."""


class ExecutionFields(Request):
    """Place and parallelism of the work."""

    on: Annotated[str, RARE] = "local"
    """Place of the work: local (processes of this machine), ray (a local Ray instance, or the cluster at RAY_ADDRESS), or http://HEAD:8265 (the whole run as a Ray job there)."""  # noqa: E501
    workers: Annotated[int, RARE] = Field(1, ge=1, le=1000)
    """Number of parallel tasks: processes of this machine, or with ray tasks of one CPU each."""

    @field_validator("on")
    @classmethod
    def _is_a_place(cls, on: str) -> str:
        refuse_ray_client(on, argument("on", on))
        if on not in ("local", "ray") and not is_head(on):
            raise RequestError(
                f"'{on}' is not a valid place to run",
                "it is local, ray, or the address of a Ray head",
                f"give {argument('on', 'ray')} or {argument('on', 'http://head:8265')}",
            )
        return on


def is_head(on: str) -> bool:
    """Return True if a place is the address of a Ray head that takes jobs."""
    return re.fullmatch(r"https?://[^\s/@?#]+/?", on) is not None


def refuse_ray_client(address: str, given: str) -> None:
    """Refuse the Ray Client.

    Raises:
        RequestError: the address begins with ray://.
    """
    if address.startswith("ray://"):
        host = re.sub(r"[:/].*", "", address.removeprefix("ray://")) or "head"
        raise RequestError(
            f"{given}: omgoptim does not use the Ray Client",
            "Ray advises against it for machine learning, and a lost connection ends the run",
            f"submit the run as a Ray job: {argument('on', f'http://{host}:8265')}",
        )
