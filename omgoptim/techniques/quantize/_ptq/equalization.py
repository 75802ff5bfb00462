"""Cross-layer equalization: scale channels so that they fill the range of their tensor evenly.

The float program computes the same.

An activation has one scale for all of its channels, so that the widest channel decides the step of the narrowest. With
a factor s_C > 0 per channel of a tensor X between two layers,

    X'_C = X_C / s_C,   writer: w'_CI = w_CI / s_C, b'_C = b_C / s_C,   reader: w'_OC = w_OC * s_C

through everything that commutes with it (`equalization_groups.py`). The factors depend on how weights are quantized:

    per tensor:   s_C = sqrt(r1_C / r2_C), r1 the range of the writer's channel, r2 that of the reader's, as in
                  arXiv:1906.04721: both weights fill one range
    per channel:  a writer's rows have scales of their own, so X is what matters, against the reader's columns as in
                  arXiv:2211.10438: s_C = max|X_C| * (mean_O (w_OC max|X_C| / max_C')^2)^(-(1 - a) / 2)
                  For a = 1 every channel of X' has the same range; for less, some of it is left in X' where the
                  reader's column is small, so that the reader's own rows keep a finer resolution. A depthwise reader
                  has a scale for every channel, and takes a = 1.

Both give the same program for all programs that differ only by such factors, however unevenly spread they are. Differs
from the papers in its coverage: branches, residual sums, pooling and grouped convolutions are scaled too, where all
writers and readers of a tensor allow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from omgoptim.models.onnx_file import initializers, set_values
from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.layer_weights import LayerWeight, bias_of, find_layer_weights, set_bias
from omgoptim.techniques.quantize._ptq.calibration import ActivationReader, Batch
from omgoptim.techniques.quantize._ptq.equalization_groups import EqualizationGroup, find_groups

SHARES = (1.0, 0.5)
"""Values of `a` that are tried; other values gave less SQNR on the benchmarked networks."""

DFQ_ITERATIONS = 20
"""Iterations of the per-tensor formula, which settles one pair of layers at a time. Chosen: time."""

MAX_FACTOR = 1e4
"""Largest factor relative to the median of its group, its inverse the smallest. Chosen: a nearly dead channel would get
a factor that float32 cannot represent."""

CLIP_MARGIN = 0.95
"""Fraction of its upper bound up to which a Clip's input counts as a ReLU's. Chosen: a reserve for unseen data."""


def channel_peaks(
    model: ModelProto, groups: Sequence[EqualizationGroup], batches: Sequence[Batch], threads: int = 1
) -> dict[str, NDArray[np.float32]]:
    """Return max|X_C| of every tensor of the groups, over the batches."""
    axes = {name: group.axis for group in groups for name in group.tensors}
    peaks: dict[str, NDArray[np.float32]] = {}
    if not axes:
        return peaks
    for _, values in ActivationReader(model, list(axes), exact=True, threads=threads).slices(batches):
        for name, array in values.items():
            channel_axis = axes[name] % array.ndim
            peak = np.abs(array).max(axis=tuple(axis for axis in range(array.ndim) if axis != channel_axis))
            peaks[name] = np.maximum(peaks[name], peak) if name in peaks else peak
    return peaks


def equalize_channels(
    model: ModelProto,
    chosen: Sequence[OnnxLayer],
    params: Static,
    share: float,
    peaks: Mapping[str, NDArray[np.float32]] | None = None,
    batches: Sequence[Batch] = (),
) -> tuple[ModelProto, int]:
    """Return an equalized copy of the program, and the number of equalization groups.

    Args:
        model: the float program.
        chosen: layers that may be changed.
        params: number format and granularity.
        share: `a` above, 0..1; per-tensor weights do not use it.
        peaks: of `channel_peaks`, for the same program and layers.
        batches: to read the peaks from, if they are not given.
    """
    copy = deepcopy(model)
    groups = find_groups(copy, find_layer_weights(copy, chosen))
    if peaks is None:
        peaks = channel_peaks(copy, groups, batches)
    scalable = [group for group in groups if _may_scale(copy, group, peaks)]
    if params.granularity == "per_tensor":
        for _ in range(DFQ_ITERATIONS):
            for group in scalable:
                _scale(copy, group, _bounded(weight_factors(group)))
    else:
        for group in scalable:  # all first: a reader's columns can only be compared in a row whose inputs are even
            _scale(copy, group, _bounded(_reader_peaks(group, peaks)))
        for group, factors in [(group, _bounded(column_factors(group, share))) for group in scalable]:
            _scale(copy, group, factors)
    for group in scalable:
        for clip in group.clips:
            clip.op_type = "Relu"
            del clip.input[1:]
    return copy, len(scalable)


def weight_factors(group: EqualizationGroup) -> NDArray[np.float64]:
    """Return s_C = sqrt(r1_C / r2_C) of the largest writer and reader; 1 where a range is 0."""
    written = np.max([np.abs(layer.read()).max(axis=(2, 3)).reshape(-1) for layer in group.writers], axis=0)
    read = np.max([np.abs(layer.read()).max(axis=(1, 3)).reshape(-1) for layer in group.readers], axis=0)
    nonzero = (written > 0) & (read > 0)
    return np.where(nonzero, np.sqrt(np.where(nonzero, written, 1) / np.where(nonzero, read, 1)), 1.0)


def column_factors(group: EqualizationGroup, share: float) -> NDArray[np.float64]:
    """Return the second factor of each channel, u_C^-(1 - a), u the size of the reader's column.

    u_C is the root mean square over the rows of |w_OC| / max_C' |w_OC'|, the largest over readers; a channel that only
    depthwise layers read gives nothing back.
    """
    sizes = []
    for layer in group.readers:
        w_GOIT = np.abs(layer.read()).astype(np.float64)
        if w_GOIT.shape[2] == 1:
            continue
        rows = w_GOIT.max(axis=(2, 3), keepdims=True)
        relative = (w_GOIT / np.where(rows > 0, rows, 1)).max(axis=3)
        sizes.append(np.sqrt(np.square(relative).mean(axis=1)).reshape(-1))
    if not sizes:
        return np.ones(group.readers[0].read().shape[0])
    u_C = np.max(sizes, axis=0)
    return np.where(u_C > 0, np.power(np.where(u_C > 0, u_C, 1), share - 1), 1.0)


def _reader_peaks(group: EqualizationGroup, peaks: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return max|X_C| of the tensors that the group's readers read: after a ReLU, not before it."""
    names = {reader.node.input[0] for reader in group.readers}
    peak = np.max([peaks[name] for name in names], axis=0).astype(np.float64)
    return np.where(peak > 0, peak, 1.0 if not (peak > 0).any() else np.median(peak[peak > 0]))


def _bounded(s_C: NDArray[np.float64]) -> NDArray[np.float32]:
    middle = float(np.exp(np.log(s_C).mean()))
    return np.clip(s_C / middle, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)


def _may_scale(model: ModelProto, group: EqualizationGroup, peaks: Mapping[str, NDArray[np.float32]]) -> bool:
    """Return whether every writer's bias can be scaled, and no Clip of the group came near its bound."""
    for layer in group.writers:
        if layer.node.op_type != "MatMul" and bias_of(model, layer) is None:
            return False
    constants = initializers(model)
    for clip in group.clips:
        upper = constants.get(clip.input[2]) if len(clip.input) > 2 else None
        bound = np.inf if upper is None else float(numpy_helper.to_array(upper))
        if len(clip.input) > 2 and clip.input[2] and upper is None:
            return False
        if float(peaks[clip.output[0]].max()) > CLIP_MARGIN * bound:
            return False
    return True


def _scale(model: ModelProto, group: EqualizationGroup, s_C: NDArray[np.float32]) -> None:
    """Divide the group's channels by s_C where they are written, multiply where they are read, in place."""
    for writer in group.writers:
        _scale_rows(model, writer, (1 / s_C).astype(np.float32))
    for reader in group.readers:
        w_GOIT = reader.read()
        reader.write(w_GOIT * s_C.reshape(w_GOIT.shape[0], 1, w_GOIT.shape[2], 1))
    for name in set(group.addends):
        tensor = initializers(model)[name]
        set_values(tensor, numpy_helper.to_array(tensor) / s_C)


def _scale_rows(model: ModelProto, layer: LayerWeight, factors_O: NDArray[np.float32]) -> None:
    w_GOIT = layer.read()
    layer.write(w_GOIT * factors_O.reshape(w_GOIT.shape[0], w_GOIT.shape[1], 1, 1))
    bias = None if layer.node.op_type == "MatMul" else bias_of(model, layer)
    if bias is not None and bias.any():
        set_bias(model, layer.node, bias * factors_O)
