"""Metrics that are not built in: the user's own callable and torchmetrics. Imports torch when called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from omgoptim.errors import DataError, SetupError, did_you_mean
from omgoptim.measure.quality import Arrays, Metric, builtin_metric
from omgoptim.models.trust import Reach
from omgoptim.models.user_code import call_user, load_callable
from omgoptim.runtimes.signature import Signature, unflatten


def resolve_metric(
    name: str | Callable[..., Any],
    signature: Signature,
    original: list[Arrays],
    targets: list[Any],
    reach: Reach,
    limit_s: float,
) -> Metric:
    """The metric that a request names.

    Raises:
        DataError: it needs targets that the data lacks, or there is no such metric.
        SetupError: it is one of torchmetrics and that is not installed.
    """
    if callable(name):
        return _user_metric(getattr(name, "__name__", "metric"), name, signature, limit_s)
    builtin = builtin_metric(name, original, targets)
    if builtin is not None:
        return builtin
    if ":" in name:
        function = load_callable(name, reach, "metric", limit_s)
        return _user_metric(name.rpartition(":")[2], function, signature, limit_s)
    return _torchmetric(name, original, targets)


def _user_metric(name: str, function: Callable[..., Any], signature: Signature, limit_s: float) -> Metric:
    def whole(outputs: list[Arrays], targets: list[Any]) -> float:
        joined = _joined(outputs, signature)
        value = call_user(f"the metric {name}", limit_s, function, joined, _joined_targets(targets))
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"the metric {name} returned a {type(value).__name__}", "a float is needed") from error

    return Metric(name, whole=whole)


def _joined(outputs: list[Arrays], signature: Signature) -> Any:
    """Outputs of all batches as the model returns them, joined along the batch."""
    import torch

    def join(arrays: list[Any]) -> Any:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        same = all(tensor.shape[1:] == tensors[0].shape[1:] for tensor in tensors)
        return torch.cat(tensors) if same else tensors

    columns = list(zip(*outputs, strict=True))
    return unflatten(signature.outputs, [join(list(column)) for column in columns])


def _joined_targets(targets: list[Any]) -> Any:
    import torch

    if not targets or targets[0] is None:
        return None
    arrays = [np.asarray(target) for target in targets]
    if arrays[0].dtype == object or any(array.shape[1:] != arrays[0].shape[1:] for array in arrays):
        return targets
    return torch.from_numpy(np.concatenate(arrays))


def _torchmetric(name: str, original: list[Arrays], targets: list[Any]) -> Metric:
    try:
        import torchmetrics
        import torchmetrics.classification as classification
    except ModuleNotFoundError as error:
        raise SetupError(
            f"metric '{name}' is none of omgoptim's own (auto, top1, r2, cosine), and torchmetrics is not installed",
            "any other name is looked up in torchmetrics",
            f'{sys.executable} -m pip install "omgoptim[metrics]"',
        ) from error
    found = getattr(torchmetrics, name, None) or getattr(classification, name, None)
    known = [key for key in (*torchmetrics.__all__, *classification.__all__) if key[0].isupper()]
    if found is None:
        raise DataError(f"torchmetrics has no '{name}'", did_you_mean(name, known)[:600])
    if not targets or targets[0] is None:
        raise DataError(f"metric '{name}' needs targets", "the data's batches carry none", "use metric auto or cosine")
    classes = int(original[0][0].shape[1]) if original[0][0].ndim > 1 else 2
    arguments = (
        {"task": "multiclass", "num_classes": classes}
        if found.__module__.startswith("torchmetrics.classification") and not name.startswith(("Multi", "Binary"))
        else {}
    )
    if name.startswith("Multiclass"):
        arguments = {"num_classes": classes}

    def whole(outputs: list[Arrays], targets: list[Any]) -> float:
        import torch

        try:
            metric = found(**arguments)
            for batch, target in zip(outputs, targets, strict=True):
                metric.update(torch.from_numpy(np.ascontiguousarray(batch[0])), torch.as_tensor(np.asarray(target)))
            return float(metric.compute())
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"torchmetrics' {name} does not take these outputs and targets", str(error).strip().splitlines()[0]
            ) from error

    return Metric(name, whole=whole)
