"""Total loss of a batch: the loss on its targets, distillation losses, or both, with the forward that they need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import DataError, TechniqueError, argument
from omgoptim.models.labels import plain_labels
from omgoptim.models.outputs import ModelOutputs
from omgoptim.runtimes.signature import Signature
from omgoptim.training._distillation.teacher_outputs import TeacherOutput, TeacherOutputs
from omgoptim.training.batches import Batch
from omgoptim.training.distillation import DistillationLoss, other_outputs, same_shape
from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.losses import Loss, tensor_outputs
from omgoptim.training.modes import eval_mode


@dataclass(slots=True)
class CombinedLoss:
    """The loss of a batch as a function of the module.

    alpha x loss on the targets + (1 - alpha) x distance to the teacher's main output + distances to its other outputs
    + weight x distance of features.
    """

    signature: Signature
    loss: Loss | None
    teacher: nn.Module | None
    distillation: DistillationLoss | None
    """Loss on the teacher's outputs, resolved by the first batch; None without a teacher."""
    features: FeatureLoss | None = None
    student: nn.Module | None = None
    """Module whose layers give the features, without Accelerate's wrapper."""
    cache: TeacherOutputs | None = None
    """Cached teacher outputs; those of other samples are computed."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Precision in which the teacher runs: the student's."""
    outputs: ModelOutputs | None = None
    """Specification of the original's outputs; None: inferred from the teacher's for the first batch."""

    @property
    def learns_outputs(self) -> bool:
        """Return whether the teacher's outputs have a part in the loss.

        At alpha 1 the main output has none, unless there is nothing else to learn from.
        """
        if self.teacher is None or self.distillation is None:
            return False
        several = self.distillation.has_other_outputs or (self.outputs is not None and len(self.outputs.compared) > 1)
        return several or self.distillation.alpha != 1 or (self.loss is None and self.features is None)

    @property
    def name(self) -> str:
        """In words, for the report."""
        hard = self.loss.name if self.loss is not None else None
        parts = [hard] if hard else []
        if self.distillation is not None and self.learns_outputs:
            alpha, soft = self.distillation.alpha, self.distillation.name
            mixed = f"{alpha:g} x {hard} + {1 - alpha:g} x {soft}" if alpha != 1 else str(hard)
            parts = [soft] if hard is None or alpha == 0 else [mixed]
            parts += [self.distillation.others_name] if self.distillation.others_name else []
        if self.features is not None:
            parts.append(f"{self.features.weight:g} x {self.features.name}")
        return " + ".join(parts)

    def resolve(self, module: nn.Module, batch: Batch) -> None:
        """Resolve on one batch the loss of each output, and check that it can be computed.

        Raises:
            DataError: the loss cannot be computed, or has no gradient; the teacher's outputs are of another shape.
            TechniqueError: the distance to the teacher is of a kind that its outputs are not for.
        """
        with eval_mode(module, next(iter(batch.inputs.values())).device):
            if self.distillation is not None and self.learns_outputs:
                self._refuse_shifted_labels(module, self.distillation)
                args, kwargs = self.signature.to_call(batch.inputs)
                teacher_outputs = self.teacher_forward(batch)
                with torch.no_grad():
                    pairs = [tensor_outputs(outputs) for outputs in (module(*args, **kwargs), teacher_outputs)]
                if len(pairs[0]) != len(pairs[1]):
                    raise other_outputs(*map(len, pairs))
                for student, teacher in zip(*pairs, strict=True):
                    same_shape(student, teacher)
                self.distillation = self.distillation.resolved(teacher_outputs, self._labels(batch), self.outputs)
            value = self(module, batch)
        if not value.requires_grad:
            raise DataError(
                "the loss has no gradient",
                "the outputs depend on no trainable parameter: all are frozen, or forward uses no_grad or detach",
                f"remove no_grad and detach from forward, or do not train: {argument('epochs', 0)}",
            )

    def __call__(self, called: nn.Module, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        """Return the loss of a batch, a scalar with a gradient.

        Args:
            called: the module, or what Accelerate wraps it in.
            batch: on the module's device.
            teacher_outputs: the teacher's outputs for the batch, where they are known.
        """
        args, kwargs = self.signature.to_call(batch.inputs)
        if self.loss is not None and self.loss.computed_by_model and batch.target is not None:
            kwargs = {**kwargs, "labels": batch.target}
        if self.features is None or self.teacher is None or self.student is None:
            return self._on_outputs(called(*args, **kwargs), batch, teacher_outputs)
        with self.features.capturing(self.student, self.teacher) as captured:
            outputs = called(*args, **kwargs)
            teacher_outputs = self.teacher_forward(batch)
        inside: Tensor = self.features.weight * self.features(captured, batch.inputs.get("attention_mask"))
        if self.loss is None and not self.learns_outputs:
            return inside
        return self._on_outputs(outputs, batch, teacher_outputs) + inside

    def learned_outputs(self, batch: Batch) -> TeacherOutput:
        """Return the teacher's outputs that the student learns from a batch, by position."""
        leaves = tensor_outputs(self.teacher_forward(batch))
        indices = self.distillation.indices if self.distillation is not None else frozenset()
        return TeacherOutput(leaf if index in indices else leaf.new_empty(0) for index, leaf in enumerate(leaves))

    def teacher_forward(self, batch: Batch) -> Any:
        """Run the teacher on a batch."""
        args, kwargs = self.signature.to_call(batch.inputs)
        if self.teacher is None:
            raise ValueError("there is no teacher")
        with torch.no_grad(), self.autocast():
            return self.teacher(*args, **kwargs)

    def _on_outputs(self, outputs: Any, batch: Batch, teacher_outputs: Any) -> Tensor:
        distillation = self.distillation
        if distillation is None or not self.learns_outputs:
            return self._hard(outputs, batch)
        if self.loss is None:
            return self._soft(outputs, batch, distillation, teacher_outputs)
        if distillation.alpha != 1 or distillation.has_other_outputs:
            teacher_outputs = self.teacher_forward(batch) if teacher_outputs is None else teacher_outputs
        real = batch.inputs.get("attention_mask")
        return distillation.mix(
            lambda: self._hard(outputs, batch),
            lambda: distillation.main(outputs, teacher_outputs, self._labels(batch), real),
            lambda: distillation.others(outputs, teacher_outputs, real),
        )

    def _hard(self, outputs: Any, batch: Batch) -> Tensor:
        if self.loss is None:
            raise ValueError("there is neither a loss nor a teacher")
        return self.loss.function(outputs, batch.target)

    def _labels(self, batch: Batch) -> Any:
        return batch.target if self.outputs is None else plain_labels(batch.target, self.outputs.label_form)

    def _soft(self, outputs: Any, batch: Batch, distillation: DistillationLoss, teacher_outputs: Any) -> Tensor:
        real = batch.inputs.get("attention_mask")
        goals = self.teacher_forward(batch) if teacher_outputs is None else teacher_outputs
        return distillation.soft(outputs, goals, self._labels(batch), real)

    def _refuse_shifted_labels(self, module: nn.Module, distillation: DistillationLoss) -> None:
        """Raise for dkd on a causal language model: its row i predicts label i + 1, and dkd would take label i."""
        kind = type(module).__name__
        if distillation.form == "dkd" and any(part in kind for part in ("CausalLM", "LMHead")):
            raise TechniqueError(
                "decoupled distillation (dkd) does not support causal language models",
                f"dkd needs the label of each row of the logits, and {kind} shifts its labels internally",
                "use output loss hinton",
            )
