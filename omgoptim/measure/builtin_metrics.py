"""Built-in metrics: accuracy, R^2, perplexity and KL divergence, and agreement with the original's outputs.

All work on what a measuring process wrote, batch by batch the flat list of output arrays, and on the output that the
targets belong to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError, argument
from omgoptim.measure.agreement import cosine_outputs, predicted_classes, worst_scores
from omgoptim.models.labels import IGNORED, LabelForm, plain_labels, refuse_out_of_range
from omgoptim.models.output_detection import OutputOptions, describe_outputs, labels_kind
from omgoptim.models.outputs import Arrays, ModelOutputs, OutputSpec, class_layout
from omgoptim.runtimes.signature import Signature

BUILTIN = ("top1", "r2", "cosine", "top1_agreement", "perplexity", "kl")
"""Names of the built-in metrics, without `auto`."""

OUTPUT_DETECTION_BATCHES = 8
"""Batches from which outputs are detected, if they were not described before. Chosen: enough to see labels and batch
lengths of all kinds, while the outputs of a whole set may exceed the memory."""

CUSTOM_METRIC_FIX = f"give your own metric: {argument('metric', 'file.py:callable')}"


def token_log_likelihoods(
    outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays], index: int = 0
) -> NDArray[np.float64]:
    """Return per sample the summed log-probability of its targets over the mean number of targets, in nats.

    The mean over samples is the mean over all targets; the perplexity is exp of minus it. Scores are (N, ..., C),
    targets (N, ...) of integers, -100 left out.

    Args:
        outputs: per batch the flat list of outputs.
        targets: token ids of the same batches.
        original: outputs of the original, per batch.
        index: of the output that holds the scores.

    Raises:
        DataError: the targets do not fit the scores.
    """
    del original
    sums, counts = [], []
    for batch, raw in zip(outputs, targets, strict=True):
        scores, target = batch[index], np.asarray(raw)
        if scores.shape[:-1] != target.shape or not np.issubdtype(target.dtype, np.integer):
            raise DataError(
                "metric perplexity does not fit the outputs and targets",
                f"outputs have shape {scores.shape}, targets {target.shape} and dtype {target.dtype}",
                "it needs an integer target for each row of logits",
            )
        counted = target != IGNORED
        picked = np.take_along_axis(_log_probabilities(scores), np.where(counted, target, 0)[..., None], -1)[..., 0]
        sums.append(np.where(counted, picked, 0.0).reshape(len(target), -1).sum(1))
        counts.append(counted.reshape(len(target), -1).sum(1))
    total = np.concatenate(counts)
    used = total > 0
    return np.concatenate(sums)[used] / total[used].mean() if used.any() else np.zeros(0)


def negative_kl(
    outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays], index: int = 0
) -> NDArray[np.float64]:
    """Return per sample minus the mean KL divergence of its rows of class scores from the original's, in nats.

    0 is the original itself. Positions whose target is -100 are left out where the targets are one for each row.
    """
    divergences = []
    for batch, raw, reference in zip(outputs, targets, original, strict=True):
        candidate, reference_scores = _log_probabilities(batch[index]), _log_probabilities(reference[index])
        rows = (np.exp(reference_scores) * (reference_scores - candidate)).sum(-1)
        target = np.asarray(raw) if raw is not None else None
        fits = target is not None and target.shape == rows.shape and np.issubdtype(target.dtype, np.integer)
        counted = (target != IGNORED) if fits else np.ones(rows.shape, bool)
        flat, used = rows.reshape(len(rows), -1), np.asarray(counted).reshape(len(rows), -1)
        number = used.sum(1)
        divergences.append(((flat * used).sum(1) / np.maximum(number, 1))[number > 0])
    return np.asarray(-np.maximum(np.concatenate(divergences), 0.0), np.float64)


def _log_probabilities(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Convert logits, or probabilities if every row is one, to log-probabilities over the last axis."""
    if scores.ndim < 2 or scores.shape[-1] < 2:
        raise DataError("the metric needs class scores", f"the output is {scores.shape}", "use metric auto or cosine")
    rows = scores.astype(np.float64)
    if (rows >= 0).all() and np.allclose(rows.sum(-1), 1.0, atol=1e-3):
        return np.asarray(np.log(np.maximum(rows, 1e-12)))
    rows = rows - rows.max(-1, keepdims=True)
    return np.asarray(rows - np.log(np.exp(rows).sum(-1, keepdims=True)))


@dataclass(frozen=True, slots=True)
class Metric:
    """A quality metric, higher is better.

    Exactly one of `per_sample` and `whole` is set. Both take outputs and targets batch by batch; `per_sample` also
    takes the original model's outputs, for metrics that are an agreement with it.
    """

    name: str
    per_sample: Callable[[Sequence[Arrays], list[Any], Sequence[Arrays]], NDArray[np.float64]] | None = None
    over_all: Callable[[Sequence[Arrays], list[Any]], float] | None = None
    agreement: bool = False
    """Compares with the original model rather than with targets."""
    outputs: ModelOutputs | None = None
    """The outputs of the original model; None: detected from its outputs."""
    reads: frozenset[int] | None = None
    """Indices of the outputs that it reads; None: unknown; a single output is assumed to be read."""


def detect_outputs(
    original: Sequence[Arrays],
    targets: Sequence[Any] = (),
    metric: str = "auto",
    signature: Signature | None = None,
    target_output: str | None = None,
    ignored: Sequence[str] = (),
) -> ModelOutputs:
    """Detect the outputs of a model from its first batches; see `describe_outputs`."""
    reference, targets = list(original[:OUTPUT_DETECTION_BATCHES]), targets[:OUTPUT_DETECTION_BATCHES]
    structure: Any = "tensor" if len(reference[0]) == 1 else {"tuple": ["tensor"] * len(reference[0])}
    return describe_outputs(
        signature or Signature((), structure),
        reference,
        batch_lengths(reference, targets),
        targets,
        OutputOptions(target_output, ignored, metric),
    )


def batch_lengths(original: Sequence[Arrays], targets: Sequence[Any] = ()) -> list[int]:
    """Return the samples in each batch, from its targets, else its first output with dimensions."""
    if targets and all(isinstance(target, np.ndarray) and target.ndim for target in targets):
        return [len(target) for target in targets]
    return [next((len(array) for array in batch if array.ndim), 1) for batch in original]


def batch_first(side: Sequence[Arrays], outputs: ModelOutputs | None, back: bool = False) -> list[Arrays]:
    """Move the batch axis of each output to the front, or from there back to its place."""
    axes = {spec.index: spec.batch_axis for spec in outputs.specs if spec.batch_axis} if outputs else {}
    if not axes:
        return list(side)
    ends = [(0, axes.get(index, 0)) if back else (axes.get(index, 0), 0) for index in range(len(side[0]))]
    return [[np.moveaxis(a, *end) if a.ndim else a for a, end in zip(batch, ends, strict=True)] for batch in side]


def agreement_metric(original: Sequence[Arrays], outputs: ModelOutputs | None = None) -> Metric:
    """Return the metric of agreement with the original, on the output with the lowest agreement.

    Raises:
        DataError: the outputs are single numbers without a batch dimension.
    """
    outputs = outputs or detect_outputs(original)
    names = {spec.compared_by for spec in outputs.compared}
    name = names.pop() if len(outputs.compared) == 1 else "worst_output_agreement"
    return _worst_agreement(name, outputs, outputs.compared)


def cosine_metric(original: Sequence[Arrays], outputs: ModelOutputs | None = None) -> Metric:
    """Return the metric of mean cosine with the original, on the output with the lowest cosine.

    Raises:
        DataError: no output has a direction: all are single numbers or constant.
    """
    outputs = outputs or detect_outputs(original)
    return _worst_agreement("cosine_agreement", outputs, cosine_outputs(outputs), cosine=True)


def _worst_agreement(name: str, outputs: ModelOutputs, compared: Sequence[OutputSpec], cosine: bool = False) -> Metric:
    reads = frozenset(spec.index for spec in compared)

    def per_sample(candidate: Sequence[Arrays], targets: list[Any], reference: Sequence[Arrays]) -> NDArray[np.float64]:
        del targets
        return worst_scores(outputs, candidate, reference, cosine, reads)

    return Metric(name, per_sample=per_sample, agreement=True, outputs=outputs, reads=reads)


def builtin_metric(
    name: str, original: Sequence[Arrays], targets: list[Any], outputs: ModelOutputs | None = None
) -> Metric | None:
    """Return the built-in metric of that name (`auto` chooses by the targets); None if there is none.

    Args:
        name: of the metric, or auto.
        original: outputs of the original, per batch the flat list.
        targets: of the same batches; None for one without labels.
        outputs: of the original model; default: read from `original`.

    Raises:
        DataError: it needs targets that the data lacks, or the targets fit no output or several.
    """
    labelled = bool(targets) and targets[0] is not None
    if name == "auto":
        if not labelled:
            return agreement_metric(original, outputs)
        outputs = outputs or detect_outputs(original, targets)
        name = _metric_of_targets(outputs, targets)
    if name == "cosine":
        return cosine_metric(original, outputs)
    if name not in BUILTIN:
        return None
    if name == "kl":
        return _kl(original, targets, outputs)
    if name != "top1_agreement" and not labelled:
        raise DataError(f"metric '{name}' needs targets", "the data has no targets", "use metric auto, or give targets")
    outputs = outputs or detect_outputs(original, targets, name)
    if name == "top1_agreement":
        return _top1_agreement(outputs)
    target = outputs.require_target(CUSTOM_METRIC_FIX)
    reads = frozenset([target.index])
    if name == "r2":
        return Metric("r2", over_all=_r2(target.index), outputs=outputs, reads=reads)
    if name == "perplexity":  # higher is better: its logarithm, negated
        scored = functools.partial(token_log_likelihoods, index=target.index)
        return Metric("log_likelihood_per_token", per_sample=scored, outputs=outputs, reads=reads)
    return Metric("top1_accuracy", per_sample=_top1(target, outputs.label_form), outputs=outputs, reads=reads)


def _kl(original: Sequence[Arrays], targets: list[Any], outputs: ModelOutputs | None) -> Metric:
    """Return the metric of KL divergence: on the labelled output, else on the first class scores."""
    outputs = outputs or detect_outputs(original, targets, "kl")
    scores = [spec.index for spec in outputs.compared if spec.kind == "class_scores"]
    labelled = outputs.labelled
    index = labelled.index if labelled else next(iter(scores), outputs.compared[0].index)
    compare = functools.partial(negative_kl, index=index)
    return Metric("negative_kl", per_sample=compare, agreement=True, outputs=outputs, reads=frozenset([index]))


def _metric_of_targets(outputs: ModelOutputs, targets: list[Any]) -> str:
    kind = outputs.labels if outputs.labels != "none" else labels_kind(targets)
    if kind in ("classes", "values"):
        return "top1" if kind == "classes" else "r2"
    raise DataError(
        "no built-in metric fits the data's targets",
        f"their dtype is {np.asarray(targets[0]).dtype}; integers are treated as classes, floats as regression values",
        CUSTOM_METRIC_FIX,
    )


def _top1_agreement(outputs: ModelOutputs) -> Metric:
    """Return the agreement of class scores, on the output with the lowest agreement."""
    scores = tuple(spec for spec in outputs.compared if spec.kind == "class_scores")
    if not scores:
        raise DataError(
            "no output of the model was identified as class scores (logits or probabilities)",
            ", ".join(f"{spec.name} is {spec.kind}" for spec in outputs.specs),
            f"use metric auto, or name the output: {argument('target_output', 'NAME')}",
        )
    return _worst_agreement("top1_agreement", outputs, scores)


PerSample = Callable[[Sequence[Arrays], list[Any], Sequence[Arrays]], NDArray[np.float64]]


def _top1(spec: OutputSpec, form: LabelForm) -> PerSample:
    """Return per sample the number of correct targets over the mean number of targets of a sample.

    With one target per sample that is 1 or 0. With several (tokens, pixels) the mean is still hits over targets, and a
    sample stays one unit: its targets are not independent. Samples without a target that counts are left out.

    Scores are (N, C), (N, ..., C) or (N, C, ...), targets (N) or (N, ...). A single score per target is a logit, or
    a probability if all of the original's lie in [0, 1].
    """

    def per_sample(outputs: Sequence[Arrays], targets: list[Any], original: Sequence[Arrays]) -> NDArray[np.float64]:
        del original
        hits, counted = [], []
        for batch, raw in zip(outputs, targets, strict=True):
            target = plain_labels(np.asarray(raw), form)
            counts = target != IGNORED
            right = (_predicted(spec, batch[spec.index], target) == target) & counts
            hits.append(right.reshape(len(target), -1).sum(1))
            counted.append(counts.reshape(len(target), -1).sum(1))
        total = np.concatenate(counted)
        used = total > 0
        return np.concatenate(hits)[used] / total[used].mean() if used.any() else np.zeros(0)

    return per_sample


def _predicted(spec: OutputSpec, scores: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """Return the class of each target, in the targets' shape."""
    layout = class_layout(scores.shape, target.shape)
    if layout is None:
        raise DataError(
            "the targets do not fit the outputs",
            f"output '{spec.name}' has shape {scores.shape}, the integer targets {target.shape}",
            CUSTOM_METRIC_FIX,
        )
    axis, classes = layout
    refuse_out_of_range(target, classes)
    if axis is None:
        return np.asarray(predicted_classes(spec, scores).reshape(target.shape), target.dtype)
    return np.asarray(scores.argmax(axis))


def _r2(index: int) -> Callable[[Sequence[Arrays], list[Any]], float]:
    """Return R^2 of an output against float targets, over all samples."""

    def r2(outputs: Sequence[Arrays], targets: list[Any]) -> float:
        rows = [batch[index].reshape(len(batch[index]), -1) for batch in outputs]
        try:
            labels = [np.asarray(t, np.float64).reshape(len(t), -1) for t in targets]
        except (TypeError, ValueError) as error:
            raise DataError("metric r2 needs numeric targets", str(error)) from error
        unlike = next(((r.shape, t.shape) for r, t in zip(rows, labels, strict=True) if r.shape != t.shape), None)
        if unlike is not None:
            raise DataError("the targets do not fit the outputs", f"outputs {unlike[0]}, targets {unlike[1]}")
        whole_rows = np.concatenate([np.isfinite(label).all(1) for label in labels])
        if not whole_rows.all():
            raise DataError(
                f"the target of sample {int(whole_rows.argmin())} is NaN or infinite",
                f"{int((~whole_rows).sum())} of {len(whole_rows)} targets are, and r2 is not defined with them",
                f"remove such samples, or give your own metric: {argument('metric', 'file.py:callable')}",
            )
        if len({row.shape[1] for row in rows}) > 1:  # samples of several sizes: one mean for all entries
            rows, labels = [row.reshape(-1, 1) for row in rows], [label.reshape(-1, 1) for label in labels]
        predicted, actual = np.concatenate(rows).astype(np.float64), np.concatenate(labels)
        spread = float(((actual - actual.mean(0)) ** 2).sum())
        if spread == 0:
            raise DataError(
                "r2 is not defined if all targets are equal",
                f"the variance of the {len(actual)} targets is zero",
                f"give more evaluation samples, or your own metric: {argument('metric', 'file.py:callable')}",
            )
        return 1.0 - float(((actual - predicted) ** 2).sum()) / spread

    return r2
