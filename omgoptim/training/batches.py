"""Batches of the user's training data: tensors by input name, and the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omgoptim.errors import DataError, argument
from omgoptim.models.data import DataSource
from omgoptim.models.forward import name_inputs
from omgoptim.models.outputs import ModelOutputs
from omgoptim.models.raw_batch import RawBatch
from omgoptim.models.samples import refuse_other_rows
from omgoptim.runtimes.signature import Signature
from omgoptim.training.modes import seed_everything

MAX_BATCHES = 200_000
"""Batches of a pass after which training data counts as endless. Chosen above ImageNet's 160,000 at batch 8."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples with their targets."""

    inputs: dict[str, Tensor]
    """Inputs by name, the batch first, in the signature's dtypes."""
    target: Any = None
    """A tensor where the data's target is an array or a list of numbers (integers as int64, floats as float32), the
    user's own object where it is something else, None without labels."""

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch on a device; a target that is not a tensor stays as it is."""
        target = self.target.to(device) if isinstance(self.target, Tensor) else self.target
        return replace(self, inputs={name: tensor.to(device) for name, tensor in self.inputs.items()}, target=target)


@dataclass(slots=True)
class Batches:
    """Reader of the train split, epoch by epoch."""

    data: DataSource
    module: nn.Module
    """Module whose forward names the inputs; a compressed copy has the same one."""
    signature: Signature
    outputs: ModelOutputs | None = None
    """Specification of the original's outputs; None: not known."""
    _counted: dict[int, tuple[int, Batch]] = field(default_factory=dict)
    _samples: dict[int, int] = field(default_factory=dict)

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        """Yield the batches of the train split, in an order drawn from torch's global random state.

        A last batch of one sample is left out where others are larger: batch normalization cannot train on it.

        Raises:
            DataError: a batch lacks some of the model's inputs, or a target of another length.
            UserCodeError: the user's data failed.
        """
        waiting, largest = None, 0
        for raw in self.data.epoch(batch_size):
            if waiting is not None:
                yield waiting
            waiting = self._batch(raw)
            largest = max(largest, waiting.size)
        if waiting is not None and (waiting.size > 1 or largest == 1):
            yield waiting

    def survey(self, batch_size: int, seed: int, check: Callable[[Any], None]) -> tuple[int, Batch]:
        """Return the number of batches in an epoch, and its first one; read once, then cached.

        Args:
            batch_size: samples in a batch where the data yields samples.
            seed: of the order in which the data is read; the global random state is left seeded with it.
            check: is shown each target, and raises if it does not fit.

        Raises:
            DataError: the train data is empty, or whatever `check` and `epoch` raise.
        """
        if batch_size not in self._counted:
            seed_everything(seed, 0, 0)
            first, count, samples = None, 0, 0
            for batch in self.epoch(batch_size):
                check(batch.target)
                first, count, samples = first or batch, count + 1, samples + batch.size
                if count > MAX_BATCHES:
                    raise DataError(
                        "the training data is endless",
                        f"it yielded more than {MAX_BATCHES:,} batches; an epoch is one pass over the data",
                        "end the iterable after one pass, for instance with itertools.islice(batches, count)",
                    )
            if first is None:
                raise DataError(
                    "the training data is empty",
                    "it yielded no batch for split='train'",
                    f"give training samples, or do not train: {argument('epochs', 0)}",
                )
            self._counted[batch_size], self._samples[batch_size] = (count, first), samples
        return self._counted[batch_size]

    def samples(self, batch_size: int) -> int:
        """Return the number of samples in an epoch, once `survey` ran at that batch size."""
        return self._samples[batch_size]

    def _batch(self, raw: RawBatch) -> Batch:
        named = {name: tensor for name, tensor, _ in name_inputs(self.module, raw.inputs, self.signature.input_names)}
        missing = [name for name in self.signature.input_names if name not in named]
        if missing:
            raise DataError(
                "a training batch lacks inputs that the evaluation data has",
                f"missing: {', '.join(missing)}; present: {', '.join(named)}",
                "yield the same inputs for every split",
            )
        inputs = {t.name: named[t.name].to(getattr(torch, t.dtype)) for t in self.signature.inputs}
        lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in inputs.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(
                "the inputs of a training batch have different batch sizes, or no batch dimension",
                f"{lengths}; dimension 0 is the batch",
            )
        return Batch(inputs, as_target(raw.target, next(iter(lengths.values()))))


def as_target(target: Any, length: int) -> Any:
    """Return a target as a tensor where it is numbers, else the user's own object.

    Args:
        target: of one batch, as the data gives it.
        length: samples in the batch.

    Raises:
        DataError: it is a tensor of another length.
    """
    if target is None:
        return None
    if not isinstance(target, Tensor):
        try:
            array = (
                np.asarray(target) if isinstance(target, (list, tuple, np.ndarray, np.generic, int, float)) else None
            )
        except (ValueError, TypeError, RuntimeError):  # lists of unequal length, tensors of several shapes
            return target
        if array is None or array.dtype.kind not in "biuf":
            return target
        target = torch.from_numpy(np.array(array))  # a copy: memory that cannot be written to is not a tensor's
    tensor = target.detach().reshape(1) if target.ndim == 0 else target.detach()
    refuse_other_rows(tensor, length)
    return tensor.float() if tensor.is_floating_point() else tensor.long()
