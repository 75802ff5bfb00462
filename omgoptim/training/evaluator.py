"""Evaluation on the selection samples, in this process, for best weights and early stopping.

It never sees the evaluation data. In a report only the quality of rounds and epochs comes from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from omgoptim.errors import DataError
from omgoptim.measure.agreement import relative_errors
from omgoptim.measure.builtin_metrics import Metric, detect_outputs
from omgoptim.measure.metrics import RequestedFunction, resolve_metric
from omgoptim.measure.quality import score
from omgoptim.models.outputs import Arrays
from omgoptim.models.samples import Samples
from omgoptim.models.security.user_code import call_user
from omgoptim.runtimes.signature import Signature, flatten
from omgoptim.runtimes.torch_engines import to_array, to_tensor
from omgoptim.training.modes import eval_mode

COLLAPSED = -math.inf
"""Score of a module whose outputs are not finite where the original's are, or whose metric is not a number: below any
other, so that such a round or epoch is undone.
"""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Metric on fixed samples, with the original model's outputs and score on them."""

    samples: Samples
    signature: Signature
    metric: Metric
    outputs: list[Arrays]
    """Outputs of the original, per batch."""
    original: float
    """The original's score."""
    limit_s: float
    device: str = "cpu"

    @staticmethod
    def of(
        module: nn.Module, samples: Samples, signature: Signature, metric: RequestedFunction, device: str = "cpu"
    ) -> Evaluator:
        """Create an evaluator with the request's metric and `module` as the original.

        Args:
            module: the original, in eval mode.
            samples: to evaluate on.
            signature: how modules are called.
            metric: of the request.
            device: that modules are evaluated on.

        Raises:
            DataError: there are no samples, or the metric does not suit them.
            SetupError, UserCodeError: the metric's package or code.
        """
        if not samples.batches:
            raise DataError("there are no samples to evaluate quality on", "the selection samples are empty")
        outputs = _run(module, samples, signature, metric.limit_s, device)
        resolved = resolve_metric(metric, signature, outputs, samples.targets)
        original = score(resolved, outputs, samples.targets, outputs)
        return Evaluator(samples, signature, resolved, outputs, original, metric.limit_s, device)

    def score(self, module: nn.Module) -> float:
        """Return the metric's value, higher is better; `COLLAPSED` where the module gives no usable numbers.

        The module runs in eval mode, without gradients, and is left as it was: mode, device and weights.

        Raises:
            DataError: the metric cannot be computed for another reason.
            UserCodeError: the module or the user's metric failed.
        """
        return self.value_of(self.outputs_of(module))

    def outputs_of(self, module: nn.Module) -> list[Arrays]:
        """Return a module's outputs on the samples, per batch; the module is left as it was."""
        return _run(module, self.samples, self.signature, self.limit_s, self.device)

    def usable(self, outputs: Sequence[Arrays]) -> bool:
        """Return whether outputs are finite wherever the original's are."""
        pairs = zip(outputs, self.outputs, strict=True)
        return not any(_broken(made, of_original) for made, of_original in pairs)

    def value_of(self, outputs: Sequence[Arrays]) -> float:
        """Return the metric's value for outputs on the samples, per batch; `COLLAPSED` as in `score`.

        Raises:
            DataError, UserCodeError: as `score`.
        """
        if not self.usable(outputs):
            return COLLAPSED
        if self.metric.per_sample is not None:
            value = float(self.metric.per_sample(outputs, self.samples.targets, self.outputs).mean())
        elif self.metric.over_all is not None:
            value = float(self.metric.over_all(outputs, self.samples.targets))
        else:
            raise ValueError(f"metric {self.metric.name} has no function")
        return value if math.isfinite(value) else COLLAPSED


def distance_to_original(evaluator: Evaluator, module: nn.Module) -> float:
    """Return how far a module's outputs are from the original's on the selection samples; breaks ties of scores.

    The mean of the relative errors of the floating outputs, as the report has them, those of class scores too. Infinite
    where an output is not finite and the original's is.
    """
    outputs = evaluator.metric.outputs or detect_outputs(evaluator.outputs)
    try:
        errors = relative_errors(outputs, evaluator.outputs_of(module), evaluator.outputs)
    except DataError:
        return math.inf
    distance = float(np.mean(errors)) if errors else 0.0
    return distance if math.isfinite(distance) else math.inf


def _run(module: nn.Module, samples: Samples, signature: Signature, limit_s: float, device: str) -> list[Arrays]:
    """Return the outputs per batch as flat lists of arrays, floating ones as float32."""

    def forward(batch: dict[str, Any]) -> Arrays:
        tensors = {t.name: to_tensor(batch[t.name], t.dtype, device) for t in signature.inputs}
        args, kwargs = signature.to_call(tensors)
        return [to_array(leaf) for leaf in flatten(module(*args, **kwargs))]

    doing = "evaluating the model on the selection samples"
    with (
        eval_mode(module, device),
        torch.no_grad(),
    ):  # a tensor that forward keeps in inference mode could not be trained on
        return [call_user(doing, limit_s, forward, batch) for batch in samples.batches]


def _broken(outputs: Sequence[Any], original: Sequence[Any]) -> bool:
    """Return whether a value is not finite where the original's is, or NaN anywhere."""
    for made, reference in zip(outputs, original, strict=True):
        if made.dtype.kind != "f":
            continue
        wrong = ~np.isfinite(made)
        if wrong.any() and (np.isnan(made).any() or made.shape != reference.shape):
            return True
        if wrong.any() and bool((made[wrong] != reference[wrong]).any()):
            return True
    return False
