"""What a batch costs: the loss on its targets, the distance to a teacher, or both, with the forward that they need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import DataError
from omgoptim.runtimes.signature import Signature
from omgoptim.training.batches import Batch
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.judge import judged
from omgoptim.training.losses import Loss


@dataclass(slots=True)
class Objective:
    """The loss of a batch as a function of the module."""

    signature: Signature
    loss: Loss | None
    teacher: nn.Module | None
    distillation: DistillationLoss | None
    """Its kind is settled by the first batch; None without a teacher."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The precision in which the teacher runs: the student's."""

    @property
    def name(self) -> str:
        """In words, for the report."""
        hard = self.loss.name if self.loss is not None else None
        if self.distillation is None or self.teacher is None or (hard and self.distillation.alpha == 1):
            return hard or ""
        if hard is None or self.distillation.alpha == 0:
            return self.distillation.name
        alpha = self.distillation.alpha
        return f"{alpha:g} x {hard} + {1 - alpha:g} x {self.distillation.name}"

    def settle(self, module: nn.Module, batch: Batch) -> None:
        """Settle on one batch whether outputs are class scores, and find out whether the loss works at all.

        Raises:
            DataError: the loss cannot be computed, or has no gradient.
        """
        if self.teacher is not None and self.distillation is not None:
            self.distillation = self.distillation.decided(self._taught(batch), batch.target)
        with judged(module, next(iter(batch.inputs.values())).device):
            value = self(module, batch)
        if not value.requires_grad:
            raise DataError("the loss has no gradient", "no parameter that is trained has a part in the outputs")

    def __call__(self, called: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar with a gradient.

        Args:
            called: the module, or what Accelerate wraps it in.
        """
        args, kwargs = self.signature.to_call(batch.inputs)
        if self.loss is not None and self.loss.by_the_model and batch.target is not None:
            kwargs = {**kwargs, "labels": batch.target}
        outputs = called(*args, **kwargs)
        if self.teacher is None or self.distillation is None:
            return self._hard(outputs, batch)
        distillation = self.distillation
        if self.loss is None:
            return self._soft(outputs, batch, distillation)
        return distillation.mixed(lambda: self._hard(outputs, batch), lambda: self._soft(outputs, batch, distillation))

    def _hard(self, outputs: Any, batch: Batch) -> Tensor:
        if self.loss is None:
            raise ValueError("there is neither a loss nor a teacher")
        return self.loss.function(outputs, batch.target)

    def _soft(self, outputs: Any, batch: Batch, distillation: DistillationLoss) -> Tensor:
        real = batch.inputs.get("attention_mask")
        return distillation.soft(outputs, self._taught(batch), batch.target, real)

    def _taught(self, batch: Batch) -> Any:
        args, kwargs = self.signature.to_call(batch.inputs)
        if self.teacher is None:
            raise ValueError("there is no teacher")
        with torch.no_grad(), self.autocast():
            return self.teacher(*args, **kwargs)
