"""Losses on targets: inferred from outputs and targets, the model's own, or the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omgoptim.errors import DataError, argument
from omgoptim.measure.builtin_metrics import detect_outputs
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.labels import IGNORED, LabelForm, plain_labels
from omgoptim.models.outputs import EntryScales, ModelOutputs
from omgoptim.models.security.user_code import call_user, load_callable
from omgoptim.runtimes.signature import flatten
from omgoptim.runtimes.torch_engines import to_array
from omgoptim.training.class_scores import ClassScores

OWN_LOSS_FIX = f"give your own loss, {argument('loss', 'file.py:callable')}: loss(outputs, targets) -> a scalar tensor"

OVER_SCALES = ", each column divided by its own standard deviation"
"""Description of a loss on an output whose entries are of far different scales."""


def _accept_any(_target: Any) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss on the targets, and what is known about it before the first step."""

    name: str
    """Description for the report."""
    function: Callable[[Any, Any], Tensor]
    """`function(outputs, target)`: outputs as the module returns them, a scalar with a gradient."""
    check: Callable[[Any], None] = _accept_any
    """Raise a DataError on a target that does not fit the outputs."""
    computed_by_model: bool = False
    """The module computes the loss itself, when it is called with `labels`."""

    @staticmethod
    def counted(target: Any) -> int | None:
        """Return how many targets of a batch count, the weight of its mean loss; None: the number of samples."""
        if isinstance(target, Tensor) and not target.is_floating_point():
            return int((target != IGNORED).sum())
        return None


def tensor_outputs(outputs: Any, count: int | None = None) -> list[Tensor]:
    """Return the tensors of a model's outputs, in order.

    Args:
        outputs: a tensor, or nested tuples, lists, mappings or dataclasses of tensors.
        count: how many the model returns without labels: with them a Hugging Face model returns its loss too, which is
            passed over then. Not known: it is passed over.
    """
    leaves = [leaf for leaf in flatten(outputs) if isinstance(leaf, Tensor)]
    if isinstance(outputs, Mapping) and "loss" in outputs and len(leaves) != count:
        without_loss = {key: value for key, value in outputs.items() if key != "loss"}
        return [leaf for leaf in flatten(without_loss) if isinstance(leaf, Tensor)]
    return leaves


def over_scales(values: Tensor, scales: EntryScales | None) -> Tensor:
    """Return values in units of the spread of their entries; as they are without scales."""
    if scales is None or values.ndim <= scales.axis or values.shape[scales.axis] != len(scales.values):
        return values
    along = [-1 if axis == scales.axis else 1 for axis in range(values.ndim)]
    return values / torch.tensor(scales.values, device=values.device, dtype=values.dtype).view(along)


def described_tensors(leaves: Sequence[Tensor], target: Any = None) -> ModelOutputs:
    """Infer the specification of outputs from one batch and its target."""
    labels = [target.detach().cpu().numpy() if isinstance(target, Tensor) else target]
    return detect_outputs([[to_array(leaf) for leaf in leaves]], labels)


def main_output(outputs: Any) -> Tensor:
    """Return the first tensor that has a batch dimension.

    Hugging Face outputs with labels begin with their loss, a scalar, which is skipped.

    Raises:
        DataError: there is none.
    """
    if isinstance(outputs, Mapping):
        outputs = {key: value for key, value in outputs.items() if key != "loss"}
    found = next((leaf for leaf in flatten(outputs) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if found is None:
        raise DataError(
            "the model returns no tensor with a batch dimension to compute a loss on",
            f"it returned a {type(outputs).__name__}",
            "let forward return its predictions as the first output",
        )
    return found


def loss_of(
    requested: RequestedFunction, outputs_example: Any, target_example: Any, module: nn.Module | None = None
) -> Loss | None:
    """Return the loss that a request names; None for `auto` without targets.

    `auto` is the model's own loss where `module` takes `labels` and returns a mapping, as those of Hugging Face do.
    Else labels of classes give cross-entropy (targets of -100 left out; class axis last or second), or binary
    cross-entropy where there is one score per target; float targets of the outputs' shape give the mean squared error.
    Outputs that are probabilities already are taken as such.

    Args:
        requested: `auto`, `file.py:callable`, or the callable itself: `loss(outputs, targets)`.
        outputs_example: what the module returned for a batch.
        target_example: the target of the same batch, as `Batch` has it.
        module: that the loss is for; None where it is not known.

    Raises:
        DataError: the targets fit no output, or several; `auto` knows no loss for such outputs and targets; a label is
            out of range.
        ModelError, UserCodeError, SetupError: the user's loss cannot be imported.
    """
    spec, limit_s = requested.spec, requested.limit_s
    if callable(spec):
        return _user_loss(getattr(spec, "__name__", type(spec).__name__), spec, limit_s)
    if spec != "auto":
        function = load_callable(spec, requested.policy, "loss", limit_s)
        if not callable(function):
            raise DataError(f"loss '{spec}' is a {type(function).__name__}", "loss(outputs, targets) is needed")
        return _user_loss(spec.rpartition(":")[2], function, limit_s)
    if target_example is None:
        return None
    place = _labelled_output(outputs_example, target_example, requested.outputs)
    if module is not None and isinstance(outputs_example, Mapping) and takes_labels(module):
        return _own_loss(module, outputs_example, target_example, place)
    return _inferred_loss(place.of(outputs_example), target_example, place)


def takes_labels(module: nn.Module) -> bool:
    """Return whether forward has an argument `labels`."""
    return "labels" in inspect.signature(module.forward).parameters


@dataclass(frozen=True, slots=True)
class _LabelledOutput:
    """Position of the labelled output."""

    index: int
    count: int | None
    """Number of outputs that the model returns without labels."""
    name: str = ""
    """Name of the output, where there are several."""
    form: LabelForm = "index"
    """Form of the data's labels."""
    scales: EntryScales | None = None
    """Spreads of its entries, where they are of far different scales."""

    def of(self, outputs: Any) -> Tensor:
        return tensor_outputs(outputs, self.count)[self.index]


def _labelled_output(outputs_example: Any, target: Any, outputs: ModelOutputs | None) -> _LabelledOutput:
    """Return the position of the output that the labels belong to.

    Raises:
        DataError: they fit none, or several.
    """
    main_output(outputs_example)  # raises where there is none at all
    if not isinstance(target, Tensor):
        raise DataError(
            "no default loss fits the data's targets",
            f"they are of type {type(target).__name__}; integers are treated as classes, floats as regression values",
            OWN_LOSS_FIX,
        )
    count = None if outputs is None else len(outputs.specs)
    if outputs is None or outputs.labels == "none":
        outputs = described_tensors(tensor_outputs(outputs_example, count), target)
    spec = outputs.require_target(OWN_LOSS_FIX)
    name = f" of output '{spec.name}'" if len(outputs.specs) > 1 else ""
    return _LabelledOutput(spec.index, count, name, outputs.label_form, spec.scales)


def _inferred_loss(output: Tensor, target: Any, place: _LabelledOutput) -> Loss:
    target = plain_labels(target, place.form)
    if target.is_floating_point():
        _same_count(output, target)
        return Loss(
            f"mean squared error{place.name}{OVER_SCALES if place.scales else ''}",
            lambda outputs, values: _squared_error(place.of(outputs), plain_labels(values, place.form), place.scales),
        )
    scores = ClassScores.of(output, target)
    if scores is None:
        raise _mismatch(output, target)
    scores.check(target)
    name = f"{scores.name}{place.name}"
    return Loss(
        name,
        lambda outputs, labels: scores.loss(place.of(outputs), plain_labels(labels, place.form)),
        lambda labels: scores.check(plain_labels(labels, place.form)),
    )


def _squared_error(output: Tensor, target: Tensor, scales: EntryScales | None = None) -> Tensor:
    _same_count(output, target)  # never broadcast: (N, 1) against (N) would compare every pair
    if scales is None:
        return F.mse_loss(output.reshape(target.shape).float(), target)
    values = over_scales(output.float(), scales)
    return F.mse_loss(values, over_scales(target.reshape(output.shape).to(values.dtype), scales))


def _same_count(output: Tensor, target: Tensor) -> None:
    if output.shape[0] != target.shape[0] or output.squeeze().shape != target.squeeze().shape:
        raise _mismatch(output, target)


def _mismatch(output: Tensor, target: Tensor) -> DataError:
    return DataError(
        "the targets do not fit the outputs",
        f"outputs are {tuple(output.shape)}, {str(target.dtype).removeprefix('torch.')} targets {tuple(target.shape)}",
        OWN_LOSS_FIX,
    )


def _own_loss(module: nn.Module, outputs_example: Any, target_example: Any, place: _LabelledOutput) -> Loss:
    """Return the loss that the module computes from `labels`.

    Outputs without one, of a technique that calls the module without labels, get the loss that the shapes suggest,
    shifted for a causal language model.
    """
    causal = any(part in type(module).__name__ for part in ("CausalLM", "LMHead"))

    def function(outputs: Any, target: Any) -> Tensor:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            return loss
        output = place.of(outputs)
        if causal:
            output, target = output[:, :-1], target[:, 1:]
        return _inferred_loss(output, target, _LabelledOutput(0, None)).function(output, target)

    check: Callable[[Any], None] = _accept_any
    scores = place.of(outputs_example)
    if isinstance(target_example, Tensor) and not target_example.is_floating_point():
        found = ClassScores.of(scores, target_example)
        if found is not None:
            found.check(target_example)
            check = found.check
    return Loss(f"{type(module).__name__}'s own loss", function, check, computed_by_model=True)


def _user_loss(name: str, function: Callable[[Any, Any], Any], limit_s: float) -> Loss:
    def checked(outputs: Any, target: Any) -> Tensor:
        value = call_user(f"the loss {name}", limit_s, function, outputs, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            returned = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise DataError(f"the loss {name} returned {returned}", "it must return a scalar tensor")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise DataError(
                f"the loss {name} returned a tensor without a gradient",
                "it is not connected to the outputs by differentiable torch operations",
                "compute it from the outputs with torch, without .item(), .detach() or numpy",
            )
        return value.reshape(())

    return Loss(name, checked)
