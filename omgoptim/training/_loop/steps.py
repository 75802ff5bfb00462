"""The steps of an epoch: gradients over a group of batches, then one step, through Hugging Face Accelerate.

Data-parallel training gives each process its share of every batch, and sums gradients before each step. The steps are
those of one process, with the same batches, learning rates and epochs, except that batch normalization sees a share at
a time. Processes are those that Accelerate finds in the environment (RANK, WORLD_SIZE).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from omgoptim.errors import ModelError, SetupError, TechniqueError, argument
from omgoptim.training._loop.checkpoints import Checkpoint
from omgoptim.training._loop.combined_loss import CombinedLoss
from omgoptim.training.batches import Batch
from omgoptim.training.config import TrainingConfig, optimizer_of, scheduler_of
from omgoptim.training.losses import Loss
from omgoptim.training.trainable_weights import ZeroMasks


class _Called(nn.Module):
    """Wrapper that Accelerate patches instead of the user's module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@dataclass(slots=True)
class PreparedTraining:
    """Module, optimizer and schedule as prepared by Accelerate."""

    accelerator: Any
    called: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    prepared: tuple[Any, Any]
    """Optimizer and scheduler in Accelerate's wrappers."""
    loss_fn: CombinedLoss
    config: TrainingConfig
    masks: ZeroMasks | None
    last_rate: float = 0.0
    """Learning rate of the last step."""

    @property
    def device(self) -> torch.device:
        place: torch.device = self.accelerator.device
        return place

    @property
    def ranks(self) -> int:
        """Processes that train this module together."""
        ranks: int = self.accelerator.num_processes
        return ranks

    def epoch(self, batches: Iterator[Batch], report: Callable[[int, float], None]) -> float:
        """Train for one pass over the batches.

        Args:
            batches: of one epoch.
            report: `report(batches done, mean loss)` after each step.

        Returns:
            The mean loss over what counts in all batches; NaN or infinite as soon as one batch's is, without its step.
        """
        total, weight, done = 0.0, 0, 0
        while group := list(islice(batches, self.config.accumulate)):
            counted = [self._check(batch) for batch in group]
            for index, (batch, count) in enumerate(zip(group, counted, strict=True)):
                share, last = count / max(sum(counted), 1), index == len(group) - 1
                loss = (
                    self._backward(batch, share, last)
                    if self.ranks == 1
                    else self._distributed_backward(batch, count, share)
                )
                if not math.isfinite(loss):
                    return loss
                total, weight = total + loss * count, weight + count
            self._step()
            done += len(group)
            report(done, total / max(weight, 1))
        if self.ranks > 1:
            average_buffers(self.accelerator, self.called)
        return total / max(weight, 1)

    def _distributed_backward(self, batch: Batch, count: int, share: float) -> float:
        """Backward of this process's samples of a batch; returns the loss of the whole batch, the same in each."""
        part, value = share_of(batch, self.accelerator.process_index, self.ranks), 0.0
        if part is not None:
            fraction = self._check(part) / max(count, 1)
            value = fraction * self._backward(part, share * fraction, last=True)
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device), "sum"))

    def _check(self, batch: Batch) -> int:
        """Return how many targets of a batch count, or samples, where the loss is a mean over those."""
        if self.loss_fn.loss is None:
            return batch.size
        self.loss_fn.loss.check(batch.target)
        counted = Loss.counted(batch.target)
        return batch.size if counted is None else counted

    def _backward(self, batch: Batch, share: float, last: bool) -> float:
        with nullcontext() if last else self.accelerator.no_sync(self.called):
            cache = self.loss_fn.cache
            teacher_outputs = cache.of(batch) if cache is not None else None
            teacher_outputs = None if teacher_outputs is None else teacher_outputs.to(self.device)
            loss: Tensor = self.loss_fn(self.called, batch.to(self.device), teacher_outputs)
            value = float(loss.detach())
            if math.isfinite(value):
                self._gradients(loss * share)
        return value

    def _gradients(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters.

        Raises:
            ModelError: autograd cannot go back through the forward, as after an operation in place.
        """
        try:
            self.accelerator.backward(loss)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ModelError(
                "the model cannot be trained: its backward pass failed",
                str(error).partition(" Hint: ")[0],
                "avoid in-place operations on layer outputs in forward (x = x + 1, not x.add_(1)), "
                f"or do not train: {argument('epochs', 0)}",
            ) from error

    def _step(self) -> None:
        optimizer, scheduler = self.prepared
        if self.ranks > 1:
            sum_gradients(self.accelerator, self.parameters)
        if self.masks is not None:
            self.masks.drop_gradients()
        if self.config.clip_norm:
            self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.last_rate = float(self.scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if self.masks is not None:
            self.masks.apply()

    def state(self) -> dict[str, Any]:
        """Return the optimizer, scheduler and scaler state for a checkpoint."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint."""
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.scheduler.load_state_dict(checkpoint.scheduler)
        if checkpoint.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)


@contextmanager
def prepared_steps(
    module: nn.Module,
    parameters: list[nn.Parameter],
    config: TrainingConfig,
    steps: int,
    loss_fn: CombinedLoss,
    masks: ZeroMasks | None,
) -> Iterator[PreparedTraining]:
    """Return the steps on a module, which is moved to the config's device with the adapters of its feature loss.

    Accelerate keeps its device and precision in state that the whole process shares: a caller's is put back afterwards,
    and a training of another precision can follow.

    Args:
        module: to train.
        parameters: all that are trained: the module's, and the adapters'.
        config: device, precision and optimizer.
        steps: optimizer steps of the whole training.
        loss_fn: of a batch.
        masks: weights that stay zero; None without.

    Raises:
        SetupError: accelerate is not installed, or does not import.
    """
    accelerate = _accelerate()
    kinds = accelerate.state.PartialState, accelerate.state.AcceleratorState, accelerate.state.GradientState
    shared = [kind._shared_state for kind in kinds]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        loader_config = accelerate.DataLoaderConfiguration(
            split_batches=True
        )  # one step of the schedule for each batch
        accelerator = accelerate.Accelerator(
            cpu=config.device == "cpu", mixed_precision=config.mixed_precision, dataloader_config=loader_config
        )
        # Gradients of several processes are summed by `sum_gradients`, those of the adapters too.
        called = accelerator.prepare_model(_Called(module), evaluation_mode=accelerator.num_processes > 1)
        if loss_fn.features is not None:
            loss_fn.features.to(accelerator.device)
        parameters = parameters or [nn.Parameter(torch.zeros(1))]  # nothing is trained for 0 epochs
        optimizer = optimizer_of(config, parameters)
        scheduler = scheduler_of(config, optimizer, steps)
        prepared = accelerator.prepare(optimizer, scheduler)
        loss_fn.autocast = accelerator.autocast
        yield PreparedTraining(accelerator, called, parameters, optimizer, scheduler, prepared, loss_fn, config, masks)
        accelerator.free_memory()
    finally:
        if loss_fn.features is not None:
            loss_fn.features.to("cpu")
        for state, original in zip(shared, before, strict=True):
            state.clear()
            state.update(original)


def _accelerate() -> Any:
    try:
        import accelerate
    except ModuleNotFoundError as error:
        raise SetupError(
            "training needs accelerate",
            f"{error.name} is not installed in {sys.executable}",
            f'{sys.executable} -m pip install "accelerate>=1.6"',
        ) from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise SetupError(
            "accelerate is installed but cannot be imported",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            f'{sys.executable} -m pip install --upgrade "accelerate>=1.6"',
        ) from error
    return accelerate


def share_of(batch: Batch, rank: int, ranks: int) -> Batch | None:
    """Return the samples of a batch that a process computes; None where it has none.

    A batch of fewer than two samples for each process stays whole, and is the first process's.

    Raises:
        TechniqueError: the target cannot be divided by samples.
    """
    if batch.size < 2 * ranks:
        return batch if rank == 0 else None
    start, end = (batch.size * place // ranks for place in (rank, rank + 1))
    target = batch.target
    if isinstance(target, (Tensor, list, tuple)) and len(target) == batch.size:
        target = target[start:end]
    elif target is not None:
        raise TechniqueError(
            "the training data cannot be split across workers",
            f"the target of a batch is a {type(target).__name__}, not a tensor with one row per sample",
            "train with one worker, or give targets as tensors",
        )
    return Batch({name: tensor[start:end] for name, tensor in batch.inputs.items()}, target)


def sum_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the processes; a parameter without one in any process keeps none."""
    parameters = list(parameters)
    present = torch.tensor([float(each.grad is not None) for each in parameters], device=accelerator.device)
    flat = torch.cat(
        [(each.grad if each.grad is not None else torch.zeros_like(each)).reshape(-1) for each in parameters]
    )
    present, flat = accelerator.reduce(present, "sum"), accelerator.reduce(flat, "sum")
    sizes = [each.numel() for each in parameters]
    for each, is_present, summed in zip(parameters, present.tolist(), flat.split(sizes), strict=True):
        each.grad = summed.view_as(each).to(each.dtype).clone() if is_present else None


def average_buffers(accelerator: Any, module: nn.Module) -> None:
    """Give every process the mean of the floating-point buffers, such as the statistics of batch normalization."""
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))


def from_first(value: Any, ranks: int) -> Any:
    """Return the value of the first process."""
    if ranks == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
