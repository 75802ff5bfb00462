"""Detection of the kind of each output from sample outputs and labels. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError, RequestError, argument
from omgoptim.models.labels import EVIDENCE, IGNORED, LabelForm, label_form, plain_labels
from omgoptim.models.outputs import (
    Arrays,
    EntryScales,
    Labels,
    ModelOutputs,
    OutputSpec,
    RunningMoments,
    class_layout,
    output_index,
    sample_shape,
)
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

CLASS_NAMES = re.compile(r"(^|_)(logits?|scores?|probs?|probabilit(y|ies))(_|$)")
"""Names of outputs that are scores of classes."""


NO_SIGN = (
    "floating point, with no evidence of class scores (labels that fit its shape, rows that sum to one, a name such as "
    "logits, or metric top1_agreement)"
)
"""Evidence of values."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Properties of outputs that are known from the request and the model."""

    target_output: str | None = None
    """Name or index of the output that the labels belong to; default: the one that they fit."""
    ignored: Sequence[str] = ()
    """Names or indices of outputs that are not compared."""
    metric: str = "auto"
    """`top1_agreement` marks an output as class scores, `r2` marks labels as values."""
    class_count: int | None = None
    """Number of classes by the model's own attribute (`num_classes`)."""


def describe_outputs(
    signature: Signature,
    reference: Sequence[Arrays],
    lengths: Sequence[int],
    targets: Sequence[Any],
    options: OutputOptions | None = None,
) -> ModelOutputs:
    """Describe the outputs of a model.

    Args:
        signature: inputs and outputs of the model.
        reference: the original's outputs, per batch the flat list.
        lengths: samples in each of these batches; if they differ, the batch axis of each output is certain.
        targets: of these batches; None without labels.
        options: what is known of the outputs.

    Raises:
        RequestError: there is no output of that name; all are ignored.
        DataError: the labels do not fit the output that was named.
    """
    names = signature.output_names
    if len(names) != len(reference[0]):  # a program whose signature lacks the structure
        names = [f"output_{index}" for index in range(len(reference[0]))] if len(reference[0]) > 1 else ["output"]
    options = options or OutputOptions()
    left_out = {output_index(name, names) for name in options.ignored}
    specs = [
        _plain_spec(index, name, [batch[index] for batch in reference], lengths, signature.inputs, len(names))
        for index, name in enumerate(names)
    ]
    if not any(spec.weight for spec in specs):
        raise DataError(
            "the model's output is a scalar",
            "quality is compared per sample, and a scalar has no batch dimension",
            "let forward return its predictions instead of a loss",
        )
    specs = [replace(spec, weight=0.0) if spec.index in left_out else spec for spec in specs]
    if not any(spec.weight for spec in specs):
        raise RequestError("every output of the model is ignored", ", ".join(names), "keep at least one output")
    specs = [_counted_classes(spec, options.class_count) for spec in specs]
    chosen = None if options.target_output is None else output_index(options.target_output, names)
    return _with_labels(tuple(specs), reference, targets, chosen, options.metric)


def _plain_spec(
    index: int, name: str, arrays: Arrays, lengths: Sequence[int], inputs: Sequence[InputTensor], count: int
) -> OutputSpec:
    """Describe an output without labels."""
    first = arrays[0]
    axis = _batch_axis(arrays, lengths)
    shape = tuple(
        BATCH
        if place == axis
        else size
        if all(a.shape[place : place + 1] == (size,) for a in arrays)
        else f"{name}_{place}"
        for place, size in enumerate(first.shape)
    )
    dtype = str(first.dtype)
    spec = OutputSpec(name, index, shape, dtype, "values", NO_SIGN, axis)
    if first.dtype.kind in "iub":
        return replace(spec, kind="integers", evidence=f"{dtype} numbers")
    moments = RunningMoments.over(shape, axis, dtype)
    for array in arrays:
        moments.add(array)
    scales = EntryScales.of(shape, axis, moments.squares, moments.count)
    spec = replace(spec, spread=moments.scale, constant=moments.constant, scales=scales)
    if not first.ndim:
        return replace(spec, kind="number", weight=0.0, evidence="a scalar for the whole batch: not compared")
    if all(size == 1 for size in sample_shape(shape, axis)):
        return replace(spec, kind="number", evidence="one number per sample")
    state = next((tensor for place, tensor in enumerate(inputs) if count > 1 and _returns(spec, tensor, place)), None)
    if state is not None:
        return replace(spec, kind="state", evidence=f"same shape as the input '{state.name}'")
    if axis == 0 and len(set(lengths)) > 1 and _batch_axis([array[0] for array in arrays], lengths) is not None:
        return replace(spec, evidence="entries for every pair of samples of a batch")
    place = 1 if first.ndim == 4 else -1
    sums_to_one = axis == 0 and all(_is_distribution(array, place) for array in arrays)
    by_name = axis == 0 and first.shape[place] > 1 and CLASS_NAMES.search(name.lower())  # a class alone always agrees
    if by_name or (sums_to_one and first.ndim == 2):
        evidence = f"its name is '{name}'" if not sums_to_one else "its rows are non-negative and sum to one"
        return replace(spec, kind="class_scores", evidence=evidence, class_axis=place, probabilities=sums_to_one)
    return spec


def _counted_classes(spec: OutputSpec, count: int | None) -> OutputSpec:
    """Mark a two-dimensional output as class scores if it has as many entries as the model has classes."""
    if spec.kind != "values" or spec.batch_axis != 0 or len(spec.shape) != 2 or spec.shape[1] != count:
        return spec
    return replace(spec, kind="class_scores", class_axis=-1, evidence=f"the model's config declares {count} classes")


def _batch_axis(arrays: Arrays, lengths: Sequence[int]) -> int | None:
    """Return the first dimension that has the batch's length in every batch."""
    for axis in range(arrays[0].ndim):
        if all(
            array.ndim > axis and array.shape[axis] == length for array, length in zip(arrays, lengths, strict=True)
        ):
            return axis
    return None


def _returns(spec: OutputSpec, passed: InputTensor, place: int) -> bool:
    """Return whether an output is the next value of an input: same shape, and same name or not the first input."""
    floating = "float" in passed.dtype and len(passed.shape) > 1
    named = spec.name.removesuffix("_out") == passed.name
    return floating and passed.shape == spec.shape and (named or place > 0)


def _is_distribution(rows: NDArray[Any], axis: int = -1) -> bool:
    """Return whether rows of two entries or more are not negative and sum to one."""
    sums = rows.astype(np.float64).sum(axis)
    return rows.shape[axis] > 1 and bool((rows >= 0).all()) and bool((np.abs(sums - 1) < 1e-3).all())


def _with_labels(
    specs: tuple[OutputSpec, ...], reference: Sequence[Arrays], targets: Sequence[Any], chosen: int | None, metric: str
) -> ModelOutputs:
    """Add the information in the labels to the specs, and the output that the labels belong to."""
    labels = labels_kind(targets)
    if labels == "none" and metric == "top1_agreement":
        specs = _scores_by_metric(specs, chosen)
    if labels in ("none", "other"):
        return ModelOutputs(specs, labels, chosen if labels == "other" else None)
    labels, form, arrays = _label_form(specs, reference, [np.asarray(target) for target in targets], labels, metric)
    fitting = _fitting(specs, reference, arrays[0], labels)
    shape = arrays[0].shape
    top = max((int(array.max(initial=0)) for array in arrays), default=0) if labels == "classes" else 0
    if labels == "classes" and chosen is None:
        exact = _of_two_classes(reference, fitting, shape) if form in ("binary", "signed") else ()
        fitting = _narrowed(specs, exact or fitting, reference, shape, top)
    target = chosen if chosen is not None else fitting[0] if len(fitting) == 1 else None
    found = ModelOutputs(specs, labels, target, fitting, shape, form)
    if target is None or labels == "values" or target not in fitting:
        return found
    if top >= _classes(reference[0][target], shape):  # counts, or labels that are out of range
        return found
    spec = _labelled_spec(specs[target], reference, shape, form)
    return replace(found, specs=(*specs[:target], spec, *specs[target + 1 :]))


def _label_form(
    specs: Sequence[OutputSpec], reference: Sequence[Arrays], arrays: Arrays, labels: Labels, metric: str
) -> tuple[Labels, LabelForm, Arrays]:
    """Return the kind of numeric labels, the form in which they are written, and their plain form."""
    if metric == "r2":
        return "values", "index" if labels == "values" else "count", arrays
    form = label_form(arrays)
    plain = [plain_labels(array, form) for array in arrays]
    fitting = _fitting(specs, reference, plain[0], "classes")
    if form != "index" and not fitting:
        form, plain, fitting = "index", arrays, _fitting(specs, reference, arrays[0], "classes")
    binary = bool(_of_two_classes(reference, fitting, plain[0].shape))  # beside embeddings, say
    if form != "index" and fitting and (binary or form == "one_hot"):
        return "classes", form, plain
    if labels == "values":
        classes = max((_classes(reference[0][index], arrays[0].shape) for index in fitting), default=0)
        whole = all(bool(np.isin(array, [IGNORED, *range(classes)]).all()) for array in arrays)
        if fitting and whole and not _fitting(specs, reference, arrays[0], "values"):
            return "classes", "whole", [plain_labels(array, "whole") for array in arrays]
        return "values", "index", arrays
    single = fitting and all(class_layout(reference[0][i].shape, arrays[0].shape) == (None, 2) for i in fitting)
    if single and max(int(array.max(initial=0)) for array in arrays) > 1:
        return "values", "count", [plain_labels(array, "count") for array in arrays]
    return labels, "index", arrays


def _fitting(
    specs: Sequence[OutputSpec], reference: Sequence[Arrays], target: NDArray[Any], labels: Labels
) -> tuple[int, ...]:
    """Return the indices of the outputs that labels fit by their shape."""
    fits = _fits_classes if labels == "classes" else _fits_values
    able = (spec.index for spec in specs if spec.weight and spec.kind != "integers")
    return tuple(index for index in able if fits(reference[0][index], target))


def labels_kind(targets: Sequence[Any]) -> Labels:
    """Return the kind of the targets of batches."""
    if not targets or targets[0] is None:
        return "none"
    kinds = {np.asarray(target).dtype.kind if _is_numeric(target) else "O" for target in targets}
    if kinds <= set("iub"):
        return "classes"
    return "values" if kinds <= set("iubf") else "other"


def _is_numeric(target: Any) -> bool:
    return isinstance(target, (np.ndarray, np.generic, int, float)) and np.asarray(target).dtype.kind in "iubf"


def _fits_classes(output: NDArray[Any], labels: NDArray[Any]) -> bool:
    return class_layout(output.shape, labels.shape) is not None


def _fits_values(output: NDArray[Any], labels: NDArray[Any]) -> bool:
    sizes = [size for size in output.shape if size != 1]
    return output.ndim > 0 and len(output) == len(labels) and sizes == [size for size in labels.shape if size != 1]


def _narrowed(
    specs: Sequence[OutputSpec], fitting: tuple[int, ...], reference: Sequence[Arrays], shape: tuple[int, ...], top: int
) -> tuple[int, ...]:
    """Narrow the outputs that labels fit to those with enough classes, and these to those that look like scores."""
    enough = tuple(index for index in fitting if top < _classes(reference[0][index], shape)) or fitting
    scores = tuple(index for index in enough if specs[index].kind == "class_scores")
    return scores or enough


def _of_two_classes(reference: Sequence[Arrays], fitting: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the outputs with one score, or two, for each label."""
    return tuple(index for index in fitting if _classes(reference[0][index], shape) == 2)


def _classes(output: NDArray[Any], label_shape: tuple[int, ...]) -> int:
    layout = class_layout(output.shape, label_shape)
    return layout[1] if layout else 0


def _labelled_spec(
    spec: OutputSpec, reference: Sequence[Arrays], shape: tuple[int, ...], form: LabelForm
) -> OutputSpec:
    """Describe the output that labels of classes belong to."""
    layout = class_layout(reference[0][spec.index].shape, shape)
    axis = layout[0] if layout else -1
    arrays = [batch[spec.index] for batch in reference]
    if axis is None:
        probabilities = all(bool(((array >= 0) & (array <= 1)).all()) for array in arrays)
    else:
        probabilities = all(_is_distribution(array, axis) for array in arrays)
    evidence = spec.evidence if spec.kind == "class_scores" else EVIDENCE[form]
    return replace(spec, kind="class_scores", class_axis=axis, probabilities=probabilities, evidence=evidence)


def _scores_by_metric(specs: tuple[OutputSpec, ...], chosen: int | None) -> tuple[OutputSpec, ...]:
    """Mark an output as class scores because of the metric: the named one, or the only possible one."""
    able = [s.index for s in specs if s.weight and s.kind in ("values", "class_scores") and s.batch_axis == 0]
    known = [index for index in able if specs[index].kind == "class_scores"]
    picked = [chosen] if chosen is not None else known or able
    if len(picked) != 1 and not known:
        names = ", ".join(specs[index].name for index in able) or "none"
        raise DataError(
            "it is ambiguous which output has the class scores (logits or probabilities)",
            f"metric top1_agreement compares predicted classes, and these outputs could be class scores: {names}",
            f"name it: {argument('target_output', 'NAME')}",
        )
    index = picked[0]
    if specs[index].kind == "class_scores":
        return specs
    place = 1 if len(specs[index].shape) == 4 else -1
    axis = place if specs[index].shape[place] != 1 else None  # of a single score the sign is the class
    spec = replace(specs[index], kind="class_scores", class_axis=axis, evidence="required by metric top1_agreement")
    return (*specs[:index], spec, *specs[index + 1 :])
