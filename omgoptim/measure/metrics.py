"""Resolution of a request's metric: built-in, the user's own callable, or torchmetrics. Imports torch when called."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError, OmgoptimError, SetupError, argument, did_you_mean
from omgoptim.measure.builtin_metrics import (
    BUILTIN,
    CUSTOM_METRIC_FIX,
    Metric,
    batch_first,
    builtin_metric,
    detect_outputs,
)
from omgoptim.models.outputs import Arrays, ModelOutputs
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.security.user_code import call_user, load_callable
from omgoptim.runtimes.signature import Signature, unflatten

SHUFFLED_SAMPLES, MIN_SHUFFLED = 256, 16
"""Largest and smallest number of shuffled samples. Chosen: time against chance."""

SHUFFLES, SIGNIFICANT = 8, 5.0
"""Times that outputs are shuffled, and standard deviations that the model's own result must lie below. Chosen."""

SLOW_METRIC_S = 0.5
"""Seconds of a call above which a metric is not called for shuffled outputs. Chosen: `SHUFFLES` calls then take 4 s."""


@dataclass(frozen=True, slots=True)
class RequestedFunction:
    """A metric or a loss as a request names it, what its code may do, and the outputs that it reads."""

    spec: str | Callable[..., Any]
    """Name of a built-in or torchmetrics function, a source `file.py:callable`, or the user's callable."""
    policy: PathPolicy
    """The files and modules whose code may run."""
    limit_s: float
    """Seconds that a call of the user's function may take."""
    outputs: ModelOutputs | None = None
    """Outputs of the original model, and which one the labels belong to; None: detected from examples."""


def resolve_metric(
    requested: RequestedFunction, signature: Signature, original: Sequence[Arrays], targets: list[Any]
) -> Metric:
    """Return the metric that a request names.

    Args:
        requested: the metric.
        signature: inputs and outputs of the model.
        original: outputs of the original, per batch the flat list.
        targets: of the same batches; None for one without labels.

    Raises:
        DataError: it needs targets that the data lacks, or that fit no output or several; there is no such metric.
        SetupError: it is one of torchmetrics and that is not installed.
    """
    name, limit_s, outputs = requested.spec, requested.limit_s, requested.outputs
    if outputs is None:
        outputs = detect_outputs(original, targets, name if isinstance(name, str) else "auto", signature)
    if callable(name):
        metric = _user_metric(getattr(name, "__name__", "metric"), name, signature, limit_s, outputs)
        refuse_lower_is_better(metric, original, targets)
        return metric
    builtin = builtin_metric(name, original, targets, outputs)
    if builtin is not None:
        return builtin
    if ":" in name:
        function = load_callable(name, requested.policy, "metric", limit_s)
        if not callable(function):
            raise DataError(
                f"metric '{name}' is not callable",
                f"it is a {type(function).__name__}",
                "give a callable metric(outputs, targets) -> float",
            )
        metric = _user_metric(name.rpartition(":")[2], function, signature, limit_s, outputs)
        refuse_lower_is_better(metric, original, targets)
        return metric
    return _torchmetric(name, original, targets, outputs)


def _user_metric(
    name: str, function: Callable[..., Any], signature: Signature, limit_s: float, described: ModelOutputs
) -> Metric:
    """Wrap a callable that gets all outputs; it is assumed to read the labelled output, or the only one."""

    def over_all(outputs: Sequence[Arrays], targets: list[Any]) -> float:
        joined = _joined(outputs, signature, described)
        value = call_user(f"the metric {name}", limit_s, function, joined, _joined_targets(targets))
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's, for more than one element
            raise DataError(f"metric {name} returned a {type(value).__name__}", "it must return a float") from error

    reads = None if described.target is None else frozenset([described.target])
    return Metric(name, over_all=over_all, outputs=described, reads=reads)


def refuse_lower_is_better(metric: Metric, original: Sequence[Arrays], targets: list[Any]) -> None:
    """Raise a DataError if a metric is higher where samples have each other's outputs: an error, not a quality.

    Nothing is checked without arrays of targets, with few samples, or where the metric is slow or fails on a part.

    Args:
        metric: of the user, as a whole.
        original: outputs of the original, per batch.
        targets: of the same batches.
    """
    count, taken = 0, []
    for index, target in enumerate(targets):
        if count >= SHUFFLED_SAMPLES or not isinstance(target, np.ndarray) or not target.ndim:
            break
        taken.append((original[index], target))
        count += len(target)
    if metric.over_all is None or count < MIN_SHUFFLED:
        return
    random, parts = np.random.default_rng(0), [part for part, _ in taken]
    labels = [target for _, target in taken]
    try:
        began = time.perf_counter()
        value = metric.over_all(parts, labels)
        if time.perf_counter() - began > SLOW_METRIC_S:
            return
        first = batch_first(parts, metric.outputs)
        shuffled = [batch_first(_shuffled(first, labels, random), metric.outputs, back=True) for _ in range(SHUFFLES)]
        shuffled_values = [metric.over_all(outputs, labels) for outputs in shuffled]
    except OmgoptimError:  # not defined on so few samples
        return
    mean, spread = float(np.mean(shuffled_values)), float(np.std(shuffled_values, ddof=1))
    if not min(shuffled_values) > value or not mean - value > SIGNIFICANT * spread:
        return
    raise DataError(
        f"metric {metric.name} rates randomly permuted outputs above the model's own",
        f"it is {value:.4g} for the original model and about {mean:.4g} with outputs permuted between samples; "
        "a metric must be higher for better predictions",
        "if lower is better, return its negative; otherwise check the data and the weights",
    )


def _shuffled(parts: Sequence[Arrays], targets: Sequence[NDArray[Any]], random: np.random.Generator) -> list[Arrays]:
    """Permute the samples in each batch, and the batches if all have the same size."""
    sizes = [len(target) for target in targets]
    order = random.permutation(len(parts)) if len(set(sizes)) == 1 else np.arange(len(parts))
    shuffled = []
    for index in order:
        rows = random.permutation(sizes[index])
        shuffled.append([a[rows] if a.ndim and len(a) == len(rows) else a for a in parts[index]])
    return shuffled


def _joined(outputs: Sequence[Arrays], signature: Signature, described: ModelOutputs) -> Any:
    """Join the outputs of all batches along the batch axis of each, in the model's structure.

    An output without a batch axis comes once if it is equal in all batches; what cannot be joined is a list by batch.
    """
    import torch

    def join(arrays: list[NDArray[Any]], axis: int | None) -> Any:
        tensors = [torch.from_numpy(np.asarray(array, order="C")) for array in arrays]
        if axis is None:
            return tensors[0] if all(torch.equal(tensor, tensors[0]) for tensor in tensors) else tensors
        shapes = {tensor.shape[:axis] + tensor.shape[axis + 1 :] for tensor in tensors}
        return torch.cat(tensors, axis) if len(shapes) == 1 and tensors[0].ndim > axis else tensors

    columns = [list(column) for column in zip(*outputs, strict=True)]
    known = len(described.specs) == len(columns)
    axes: list[int | None] = [spec.batch_axis for spec in described.specs] if known else [0] * len(columns)
    return unflatten(signature.outputs, list(map(join, columns, axes)))


def _joined_targets(targets: list[Any]) -> Any:
    import torch

    if not targets or targets[0] is None:
        return None
    arrays = [target for target in targets if isinstance(target, np.ndarray)]
    if len(arrays) < len(targets) or any(array.shape[1:] != arrays[0].shape[1:] for array in arrays):
        return targets
    joined = np.concatenate(arrays)
    return joined.tolist() if joined.dtype.kind in "US" else torch.from_numpy(joined)


def _torchmetric(name: str, original: Sequence[Arrays], targets: list[Any], outputs: ModelOutputs) -> Metric:
    found = _torchmetrics_class(name)
    if not targets or targets[0] is None:
        raise DataError(f"metric '{name}' needs targets", "the data has no targets", "use metric auto")
    index = 0 if len(outputs.specs) == 1 else outputs.require_target(CUSTOM_METRIC_FIX).index
    arguments = _class_arguments(name, found, original[0][index])

    def converting_errors(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            lines = str(error).strip().splitlines()
            raise DataError(
                f"torchmetrics' {name} does not accept these outputs and targets",
                lines[0] if lines else type(error).__name__,
                f"give your own metric: {argument('metric', 'file.py:callable')}",
            ) from error

    sign = -1 if converting_errors(lambda: found(**arguments)).higher_is_better is False else 1

    def over_all(outputs_by_batch: Sequence[Arrays], targets: list[Any]) -> float:
        import torch

        def compute() -> float:
            metric = found(**arguments)
            for batch, target in zip(outputs_by_batch, targets, strict=True):
                metric.update(torch.from_numpy(np.ascontiguousarray(batch[index])), torch.as_tensor(np.asarray(target)))
            return sign * float(metric.compute())

        value: float = converting_errors(compute)
        return value

    name = name if sign > 0 else f"negative_{name}"
    return Metric(name, over_all=over_all, outputs=outputs, reads=frozenset([index]))


def _torchmetrics_class(name: str) -> Any:
    try:
        import torchmetrics
        import torchmetrics.classification as classification
    except ModuleNotFoundError as error:
        raise SetupError(
            f"metric '{name}' is not built in, and torchmetrics is not installed",
            f"the built-in metrics are {', '.join(('auto', *BUILTIN))}; any other name is looked up in torchmetrics",
            f'{sys.executable} -m pip install "omgoptim[metrics]"',
        ) from error
    known = {key for key in (*torchmetrics.__all__, *classification.__all__) if key[0].isupper()}
    if name not in known:
        raise DataError(f"torchmetrics has no metric '{name}'", did_you_mean(name, known)[:600])
    return getattr(torchmetrics, name, None) or getattr(classification, name)


def _class_arguments(name: str, found: Any, scores: NDArray[Any]) -> dict[str, Any]:
    """Return the arguments of a classification metric: the task and the number of classes."""
    if not found.__module__.startswith("torchmetrics.classification") or name.startswith(("Multilabel", "Binary")):
        return {}
    if name.startswith("Multiclass"):
        return {"num_classes": int(scores.shape[1])} if scores.ndim > 1 else {}
    if scores.ndim < 2:
        return {"task": "binary"}
    return {"task": "multiclass", "num_classes": int(scores.shape[1])}
