"""Activation statistics of layers: ranges, outliers, channel peaks.

Computed from the float program on a few samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from omgoptim.models.onnx_file import attribute, initializers, load
from omgoptim.models.onnx_graph import OnnxLayer, find_layers, module_paths
from omgoptim.techniques.quantize._onnx.preparation import at_opset, fold_constants
from omgoptim.techniques.quantize._onnx.qdq import nodes_by_name
from omgoptim.techniques.quantize._ptq.calibration import ActivationReader

Array = NDArray[Any]

BATCH_SIZE = 8
"""Samples per run. Chosen by memory: the inputs of all layers are held at the same time."""

PERCENTILE_VALUES = 20_000
"""Values of a layer's input that are kept per run for its 99.9th percentile. Chosen: 20 lie above it."""

OUTPUT_CHANNEL = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gather": 0}
"""Axis of the weight's output channels by operator; that of a Gemm depends on `transB`."""


@dataclass(frozen=True, slots=True)
class Quantizable:
    """A layer that static quantization can quantize: its node, weight, input and output."""

    layer: OnnxLayer
    weight_position: int
    axis: int
    """Axis of the weight's output channels."""
    activation: str | None
    """Name of its input tensor; None for an embedding, whose input is indices."""
    output: str
    """Name of its output tensor, after a fused ReLU or Clip."""
    channel_axis: int
    """Axis of the channels of both tensors."""

    @property
    def is_depthwise(self) -> bool:
        """True for a depthwise convolution."""
        return self.layer.op == "Conv" and len(self.layer.shape) > 2 and self.layer.shape[1] == 1 < self.layer.shape[0]


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Statistics of a layer's input over all samples."""

    low: float
    high: float
    typical: float
    """99.9th percentile of the absolute values."""
    power: float
    """Mean of the squares."""
    channels: Array
    """(C,): the largest absolute value of each channel."""


def load_folded(source: Path, threads: int) -> tuple[ModelProto, list[OnnxLayer]]:
    """Load the float program with constants and batch norms folded, and its layers under the source's paths."""
    original = load(source)
    with tempfile.TemporaryDirectory() as folder:
        model = at_opset(load(fold_constants(original, Path(folder), threads)), 13)
    return model, find_layers(model, module_paths(original))


def quantizable_layers(model: ModelProto, chosen: Sequence[OnnxLayer]) -> list[Quantizable]:
    """Find the chosen layers that can be simulated: a float32 weight that the node reads itself."""
    nodes = nodes_by_name(model)
    stored = initializers(model)
    readers: dict[str, list[NodeProto]] = {}
    for other in model.graph.node:
        for name in other.input:
            readers.setdefault(name, []).append(other)
    kept = {value.name for value in model.graph.output}
    found = []
    for layer in chosen:
        node = nodes.get(layer.node)
        if node is None or layer.op not in (*OUTPUT_CHANNEL, "Gemm") or layer.data_type != TensorProto.FLOAT:
            continue
        position = next((i for i, name in enumerate(node.input) if name == layer.weight), None)
        rank = len(layer.shape)
        if position is None or rank < 2 or layer.weight not in stored:
            continue
        activation = None if layer.op == "Gather" else node.input[1 - position] if position < 2 else None
        if layer.op != "Gather" and (not activation or activation in stored):
            continue
        channel_axis = 1 if layer.op.startswith("Conv") else -1
        output = _after_activations(node.output[0], readers, kept)
        found.append(Quantizable(layer, position, _axis(node) % rank, activation, output, channel_axis))
    return found


def _after_activations(name: str, readers: Mapping[str, Sequence[NodeProto]], kept: set[str]) -> str:
    while name not in kept and [node.op_type for node in readers.get(name, ())] in (["Relu"], ["Clip"]):
        name = readers[name][0].output[0]
    return name


def _axis(node: NodeProto) -> int:
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return OUTPUT_CHANNEL[node.op_type]


def take_samples(model: ModelProto, batches: Sequence[Mapping[str, Array]], samples: int) -> list[dict[str, Array]]:
    """Take the first `samples` samples in small batches of the model's inputs; whole batches if the batch is fixed."""
    names = [value.name for value in model.graph.input]
    fixed = any(
        value.type.tensor_type.shape.dim and value.type.tensor_type.shape.dim[0].HasField("dim_value")
        for value in model.graph.input
    )
    taken: list[dict[str, Array]] = []
    remaining = samples
    for batch in batches:
        length = len(batch[names[0]])
        step = length if fixed else BATCH_SIZE
        for start in range(0, length, max(step, 1)):
            stop = length if fixed else min(start + step, start + remaining)
            part = {name: np.asarray(batch[name])[start:stop] for name in names}
            taken.append(part)
            remaining -= len(part[names[0]])
            if remaining <= 0:
                return taken
    return taken


def collect_statistics(
    model: ModelProto,
    found: Sequence[Quantizable],
    batches: Sequence[Mapping[str, Array]],
    threads: int,
    outputs: bool = False,
) -> dict[str, LayerStatistics]:
    """Collect the statistics of layer inputs, and of outputs if `outputs`, by tensor name."""
    channel_axes = {item.output: item.channel_axis for item in found if outputs and item.activation}
    for item in found:
        if item.activation:
            channel_axes[item.activation] = item.channel_axis
    gathered: dict[str, list[LayerStatistics]] = {name: [] for name in channel_axes}
    copies = [dict(batch) for batch in batches]
    for _, values in (
        ActivationReader(model, list(channel_axes), threads=threads).slices(copies) if channel_axes else ()
    ):
        for name, array in values.items():
            if array.size:
                gathered[name].append(_statistics_of(array, channel_axes[name]))
    return {name: _combined(parts) for name, parts in gathered.items() if parts}


def input_ranges(batches: Sequence[Mapping[str, Array]]) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest finite value of every floating input."""
    ranges: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, array in batch.items():
            finite = array[np.isfinite(array)] if np.issubdtype(array.dtype, np.floating) else array[:0]
            if finite.size:
                low, high = ranges.get(name, (np.inf, -np.inf))
                ranges[name] = min(low, float(finite.min())), max(high, float(finite.max()))
    return ranges


def _statistics_of(array: Array, channel_axis: int) -> LayerStatistics:
    values = np.asarray(array, np.float32)
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)  # a mask's fill: its own signature
    axis = channel_axis % values.ndim if values.ndim > 1 else 0
    reduced = tuple(i for i in range(values.ndim) if i != axis)
    magnitudes = np.abs(values)
    flat = magnitudes.reshape(-1)
    sample = flat[:: max(1, flat.size // PERCENTILE_VALUES)]
    return LayerStatistics(
        low=float(values.min()),
        high=float(values.max()),
        typical=float(np.quantile(sample, 0.999)),
        power=float(np.mean(np.square(values, dtype=np.float64))),
        channels=magnitudes.max(reduced) if reduced else magnitudes,
    )


def _combined(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """Combine the statistics of all runs; the percentile is the median of theirs."""
    same_shape = all(part.channels.shape == parts[0].channels.shape for part in parts)
    return LayerStatistics(
        low=min(part.low for part in parts),
        high=max(part.high for part in parts),
        typical=float(np.median([part.typical for part in parts])),
        power=float(np.mean([part.power for part in parts])),
        channels=np.max([part.channels for part in parts], 0) if same_shape else parts[0].channels,
    )
