"""Datasets of a compression run: training batches, statistics samples and selection samples.

None is evaluation data: statistics come from the train split, selection samples from the calibration split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import DataError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.outputs import ModelOutputs
from omgoptim.models.samples import Samples, batch_length, forward_args, repeat_to_size, shared_samples
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.requests import RecoveryRequest, TrainingRequest
from omgoptim.training.batches import Batches, as_target
from omgoptim.training.evaluator import Evaluator
from omgoptim.training.losses import Loss, loss_of, over_scales, tensor_outputs

STATISTICS_SAMPLES = 512
"""Samples of the train split for norms, moments, gradients and batch-norm statistics: four times the calibration set of
Wanda and SparseGPT (128), since images and short texts have fewer positions a sample."""

SELECTION_SAMPLES = 1000
"""Maximum number of samples for selecting rounds and epochs: an accuracy has a standard error of at most 0.016 then."""


@dataclass(frozen=True, slots=True)
class Datasets:
    """Data of one run by purpose."""

    statistics: Samples
    selection: Samples
    batches: Batches
    evaluator: Evaluator
    loss: Loss | None
    """Loss on the targets; None without targets, where only distillation is possible."""
    epochs: int
    notes: list[str] = field(default_factory=list)


def load_datasets(request: TrainingRequest, loaded: LoadedModel, module: nn.Module, live: Live | None) -> Datasets:
    """Load the datasets of a request.

    Raises:
        DataError: there is no training data for the requested training, or no selection samples.
    """
    live = live or Live()
    statistics = loaded.samples("train", STATISTICS_SAMPLES)
    selection = loaded.samples("calibration", SELECTION_SAMPLES)
    notes = []
    has_train = loaded.data.real and statistics.count > 0
    if not statistics.count:
        statistics = selection
    if not selection.count:
        selection = statistics
        notes.append("the calibration split is empty: rounds and epochs were selected on training samples")
    if not selection.count:
        raise DataError(
            "there are no selection samples",
            "splits 'calibration' and 'train' are both empty, and evaluation data is never used for selection",
            "let load('calibration') give a few hundred samples, and load('train') the training data",
        )
    notes += overlap_notes(statistics, "for training", loaded)
    notes += overlap_notes(selection, "for selection", loaded)
    epochs = _epochs(request, has_train)
    loss = loss_for(request, loaded, module, statistics, live)
    if epochs and loss is None and isinstance(request, RecoveryRequest) and not request.distill:
        raise DataError(
            "there is no training objective",
            "the training data has no targets, and distillation is off",
            "let the batches include targets, or leave distill on",
        )
    metric = RequestedFunction(loaded.metric, loaded.policy, request.time_limit_s, loaded.outputs)
    evaluator = Evaluator.of(module, selection, loaded.signature, metric, loaded.device)
    batches = Batches(loaded.data, module, loaded.signature, loaded.outputs)
    return Datasets(statistics, selection, batches, evaluator, loss, epochs, notes)


def _epochs(request: TrainingRequest, has_train: bool) -> int:
    if isinstance(request, RecoveryRequest) and request.recover == "none":
        return 0
    if request.epochs is None:
        return 1 if has_train else 0
    if request.epochs and not has_train:
        raise DataError(
            f"{request.epochs} epochs were requested, and there is no training data",
            "the data gave no batch for split 'train'" if request.data else "no data was given",
            "give data whose load('train') returns the training samples, or epochs=0",
        )
    return request.epochs


def loss_for(
    request: TrainingRequest, loaded: LoadedModel, module: nn.Module, statistics: Samples, live: Live
) -> Loss | None:
    """Return the loss on the targets; None where the data has none."""
    target = statistics.targets[0]
    if target is None and live.loss is None and request.loss == "auto":
        return None
    first = statistics.batches[0]
    args, kwargs = forward_args(loaded.signature, first)
    with torch.inference_mode():
        outputs = module(*args, **kwargs)
    given: Any = live.loss or request.loss
    example = None if target is None else as_target(target, batch_length(first))
    requested = RequestedFunction(given, loaded.policy, request.time_limit_s, loaded.outputs)
    return loss_of(requested, outputs, example, module)


def scoring_loss(loss: Loss | None, described: ModelOutputs | None = None) -> Callable[[Any, Any], Tensor]:
    """Return the loss whose gradient gives the importance of weights.

    It is the loss on the targets plus half the mean square of the outputs without targets, in units of their spread;
    without targets that of all outputs.

    Args:
        loss: on the targets; None where there are none.
        described: what the outputs are; None: only the first one counts.
    """

    def score(outputs: Any, target: Any) -> Tensor:
        leaves = tensor_outputs(outputs, len(described.specs) if described else None)
        if loss is None or target is None:
            return _half_mean_squares(leaves, described, None)
        count = next(len(leaf) for leaf in leaves if leaf.ndim)
        value = loss.function(outputs, as_target(target, count))
        several = described is not None and described.target is not None and len(described.compared) > 1
        return value + _half_mean_squares(leaves, described, described.target) if several and described else value

    return score


def _half_mean_squares(leaves: list[Tensor], described: ModelOutputs | None, excluded: int | None) -> Tensor:
    """Return half the mean square of the floating outputs except one, summed.

    Of several each is over its spread; entries of far different scales are over their own.
    """
    if described is None or len(described.compared) < 2:
        index = described.compared[0].index if described else 0
        scales = described.compared[0].scales if described else None
        return 0.5 * over_scales(leaves[index].float(), scales).square().mean()
    total = torch.zeros((), device=leaves[0].device)
    for spec in described.compared:
        if spec.index != excluded and leaves[spec.index].is_floating_point():
            values = leaves[spec.index].float()
            values = values / spec.spread if spec.scales is None else over_scales(values, spec.scales)
            total = total + 0.5 * values.square().mean()
    return total


def one_sample(loaded: LoadedModel) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a forward pass on one sample, for counting."""
    return forward_args(loaded.signature, repeat_to_size(loaded.evaluation, 1))


OVERLAP = 0.1
"""Fraction of samples that may be evaluation samples too without a warning, since data contains duplicates."""


def overlap_notes(drawn: Samples, purpose: str, loaded: LoadedModel) -> list[str]:
    """Return a warning where samples are evaluation samples too."""
    shared = shared_samples(drawn, loaded.evaluation) if loaded.data.real else 0
    if shared <= drawn.count * OVERLAP:
        return []
    return [
        f"{shared} of the {drawn.count} samples {purpose} are evaluation samples too: "
        "the reported quality is optimistic; let load(split) give different samples for each split"
    ]
