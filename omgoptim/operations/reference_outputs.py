"""Reference outputs of the original on calibration samples, and the description of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.hardware import usable_cores
from omgoptim.measure.builtin_metrics import CUSTOM_METRIC_FIX, Metric
from omgoptim.measure.metrics import RequestedFunction, resolve_metric
from omgoptim.measure.quality import StoredOutputs
from omgoptim.models.data import DataSource
from omgoptim.models.forward import NamedBatch, name_inputs
from omgoptim.models.labels import plain_labels, refuse_out_of_range
from omgoptim.models.output_detection import OutputOptions, describe_outputs
from omgoptim.models.outputs import Arrays, ModelOutputs, class_layout
from omgoptim.models.raw_batch import take_samples
from omgoptim.models.samples import Samples, batch_length, named_samples, repeat_to_size
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.requests import ModelRequest
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import Signature

REFERENCE_SAMPLES = 64
"""Number of samples for the description of outputs: shapes and kinds show in a few; more would only take time."""

ON_LABELS = ("auto", "top1", "r2")
"""Built-in metrics that compare labels with their output."""


def reference_outputs(
    target: Any, runtime: str, signature: Signature, samples: Samples, threads: int
) -> tuple[list[Arrays], list[int], list[Any]]:
    """Run a model on a few samples in batches of two sizes, which identifies the batch axes.

    `target` is the module, or the path of the program; there are at least two samples.

    Returns:
        Per batch the outputs, the number of samples, and the targets; only of batch sizes that the model supports.
    """
    session = ENGINES[runtime].open(target, signature, SessionSettings(threads))
    head, _ = samples.split(REFERENCE_SAMPLES)
    parts = [part for part in head.split(head.count // 2 + 1) if part.count]
    batches = [(batch, t) for part in parts for batch, t in zip(part.batches, part.targets, strict=True)]
    if head.count == 2:
        batches = [(head.batches[0], head.targets[0]), *batches] if len(head.batches) == 1 else batches
    outputs, lengths, targets = [], [], []
    for batch, given in batches:
        try:
            found = session.run(batch)
        except Exception:  # noqa: BLE001  engines raise kinds of their own; a batch of another size says enough
            continue
        outputs.append(found)
        lengths.append(batch_length(batch))
        targets.append(given)
    if outputs:
        return outputs, lengths, targets
    one: NamedBatch = repeat_to_size(head, 1)
    return [session.run(one)], [1], [None if head.targets[0] is None else head.targets[0][:1]]


def outputs_of(
    request: ModelRequest,
    metric: str | Callable[..., Any],
    target: nn.Module | Path,
    signature: Signature,
    data: DataSource,
    evaluation: Samples,
) -> ModelOutputs:
    """Describe the outputs of the original on calibration samples.

    Evaluation samples are used where there are no calibration samples, or only those have labels.

    Args:
        request: may name the output that the labels belong to, and outputs to ignore.
        metric: name, or the user's callable.
        target: the module, or the path of the program.
        signature: inputs and outputs of the model.
        data: the user's data.
        evaluation: samples to use where those of the calibration split will not do.

    Raises:
        RequestError: the request names an unknown output.
        DataError: the labels fit none or several outputs, or are none of the classes.
    """
    module = target if isinstance(target, nn.Module) else None
    raw = take_samples(data.batches("calibration"), REFERENCE_SAMPLES)
    samples = named_samples([name_inputs(module, item.inputs, signature.input_names) for item in raw], raw)
    if not raw or (samples.targets[0] is None and evaluation.targets[0] is not None):
        samples = evaluation
    runtime = "onnxruntime" if module is None else "torch_eager"
    threads = request.threads or usable_cores()
    outputs, lengths, targets = reference_outputs(target, runtime, signature, samples, threads)
    described = describe_outputs(
        signature,
        outputs,
        lengths,
        targets,
        OutputOptions(
            request.target_output,
            request.ignore_outputs,
            metric if isinstance(metric, str) else "auto",
            _class_count(module),
        ),
    )
    if metric in ON_LABELS and described.labels in ("classes", "values"):
        spec = described.require_target(CUSTOM_METRIC_FIX)
        layout = class_layout(outputs[0][spec.index].shape, described.label_shape)
        if layout and described.labels == "classes":
            for labels in evaluation.targets:
                refuse_out_of_range(plain_labels(labels, described.label_form), layout[1])
    return described


def _class_count(module: Any) -> int | None:
    """Return the class count that a module states, as in timm and Hugging Face."""
    for holder in (module, getattr(module, "config", None)):
        for name in ("num_classes", "num_labels"):
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 1:
                return count
    return None


def metric_of(loaded: LoadedModel, original: StoredOutputs, targets: list[Any], limit_s: float) -> Metric:
    """Resolve the metric of a loaded model.

    `original` are the outputs of the original on the samples of `targets`.
    """
    requested = RequestedFunction(loaded.metric, loaded.policy, limit_s, loaded.outputs)
    return resolve_metric(requested, loaded.signature, original, targets)
