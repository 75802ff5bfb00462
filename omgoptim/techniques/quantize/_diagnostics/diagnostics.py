"""Diagnostics of a program: known causes of int8 quantization error in activations, weights and the graph.

Each states what was measured, what helps, and what a candidate must change so that its cost can be measured: parameters
of the technique, or layers kept in float.

Sources: channels of uneven range and folding, arXiv:1906.04721; outliers of activations, arXiv:2306.12929 and
arXiv:2211.10438; swish and squeeze-excite, arXiv:2004.09602 (section 5); masks, `static.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from omgoptim.models.onnx_file import initializers
from omgoptim.models.onnx_graph import constant_roots
from omgoptim.techniques.quantize._diagnostics.layer_statistics import LayerStatistics, Quantizable, input_ranges
from omgoptim.techniques.quantize._diagnostics.simulation import Simulation

MASK_FILL = 1e4
"""Magnitude of a mask's fill value. Chosen: below the common ones, such as -65504 (float16) and -1e9."""

MAX_PATHS = 8
"""Maximum number of layers that a diagnostic lists. Chosen by the length of a report."""

Array = NDArray[Any]

OUTLIER_RATIO = 4.0
"""Ratio of an activation's range to its 99.9th percentile that counts as outliers. Chosen: at 4, two of the eight bits
serve one value in a thousand."""

CHANNEL_RATIO = 8.0
"""Ratio of the widest to the typical channel that counts as uneven. Chosen: at 8, the typical channel has five of the
eight bits."""

RANGE_RATIO = 1.5
"""Ratio between the ranges of evaluation and calibration inputs, either way, that counts as different data. Chosen:
more than half a bit is lost, or values are clipped."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Known cause of int8 quantization error, found in a program."""

    name: str
    paths: list[str]
    """Affected layers, the worst first."""
    evidence: str
    fix: str
    nodes: list[str] = field(default_factory=list)
    """Layers to keep in float to undo it."""
    undo: dict[str, Any] = field(default_factory=dict)
    """Parameters of the technique that undo it; comes before `nodes`."""


def mask_fills(model: ModelProto) -> Iterator[Diagnostic]:
    """Find constants that dwarf all other values, such as the fill value of an attention mask."""
    stored = initializers(model)
    roots = constant_roots(model.graph)
    values: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type not in ("Add", "Sub", "Mul", "Where", "Max", "Min", "Expand", "ConstantOfShape"):
            continue
        for root in {root for name in node.input for root in roots.get(name, ())} & stored.keys():
            array = numpy_helper.to_array(stored[root])
            if np.issubdtype(array.dtype, np.floating) and array.size:
                largest = float(np.abs(array.astype(np.float64)).max())
                if largest >= MASK_FILL:
                    values[node.name] = max(largest, values.get(node.name, 0.0))
    if values:
        worst = sorted(values, key=lambda name: -values[name])
        yield Diagnostic(
            "mask fill",
            worst[:MAX_PATHS],
            f"{worst[0]} reads a constant of {values[worst[0]]:.3g}: an int8 range that covers it rounds all other "
            "values to one level",
            "fill masks with a small value such as -100 in the model; or algorithm nncf, which keeps masks in float",
        )


def gates(model: ModelProto, layers: Sequence[Quantizable]) -> Iterator[Diagnostic]:
    """Find hard-swish and squeeze-excite: products of a value and its own gate."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    by_node = {item.layer.node: item for item in layers}
    swishes: list[str] = []
    excited: list[str] = []
    for node in graph.node:
        swish = node.op_type == "HardSwish"
        for name in node.input if node.op_type == "Mul" else ():
            gate = producers.get(name)
            if gate is None or gate.op_type not in ("Sigmoid", "HardSigmoid", "Clip", "Div"):
                continue
            chain = _nodes_before(gate, producers)
            if any(link.op_type in ("GlobalAveragePool", "ReduceMean") for link in chain):
                excited += [link.name for link in chain if link.name in by_node and link.name not in excited]
            elif set(node.input) & set(chain[-1].input) or set(node.input) & set(gate.input):
                swish = swish or gate.op_type != "Div" or any(link.op_type == "Clip" for link in chain)
        if swish:
            swishes.append(node.name)
    if swishes:
        yield Diagnostic(
            "hard-swish",
            swishes[:MAX_PATHS],
            f"{len(swishes)} activations are x times a gate of x: the small negative values share an int8 range with "
            "large positive ones, and both factors are quantized",
            "use ReLU if the model can be retrained, or scheme qat",
        )
    if excited:
        yield Diagnostic(
            "squeeze-excite",
            [by_node[name].layer.path for name in excited][:MAX_PATHS],
            f"{len(excited)} layers compute gates that scale whole channels, which amplifies their quantization error",
            "keep these layers in float: they take few bytes and little time",
            excited,
        )


def _nodes_before(gate: NodeProto, producers: Mapping[str, NodeProto], max_length: int = 12) -> list[NodeProto]:
    """Return the chain of nodes before a gate, up to the pooling of a squeeze-excite block."""
    chain, node = [gate], gate
    for _ in range(max_length):
        before = next((producers[name] for name in node.input if name in producers), None)
        if before is None:
            break
        chain.append(before)
        if before.op_type in ("GlobalAveragePool", "ReduceMean"):
            break
        node = before
    return chain


def unfolded_norms(model: ModelProto) -> Iterator[Diagnostic]:
    unfolded = [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]
    if unfolded:
        yield Diagnostic(
            "unfolded batch norm",
            unfolded[:MAX_PATHS],
            f"{len(unfolded)} batch norms could not be folded into the layer before them: each runs in float between a "
            "dequantize and a quantize",
            "place each batch norm directly after a convolution or Linear whose output nothing else reads",
        )


def diagnose(simulation: Simulation, params: Any, evaluation: Sequence[Mapping[str, Array]] = ()) -> list[Diagnostic]:
    """Return the diagnostics of the simulated program, the likeliest cause first.

    Args:
        simulation: of the program, with its ranges.
        params: of the technique: what they mend already is left out.
        evaluation: inputs as they will come, whose ranges are compared with the calibrated ones. Nothing is chosen by
            them.
    """
    found = (
        *_outliers(simulation, params),
        *_spread_weights(simulation, params),
        *_spread_activations(simulation, params),
        *mask_fills(simulation.model),
        *gates(simulation.model, simulation.layers),
        *unfolded_norms(simulation.model),
        *_calibration_mismatch(simulation, evaluation),
    )
    return list(found)


def _outliers(simulation: Simulation, params: Any) -> Iterator[Diagnostic]:
    ratios = {}
    for item, statistics in _with_statistics(simulation):
        largest = max(abs(statistics.low), abs(statistics.high))
        if statistics.typical > 0 and largest / statistics.typical >= OUTLIER_RATIO:
            ratios[item.layer.node] = largest / statistics.typical
    if ratios:
        nodes, paths = _worst(simulation, ratios)
        item = next(i for i in simulation.layers if i.layer.node == nodes[0])
        statistics = simulation.statistics[item.activation or ""]
        method = getattr(params, "range_method", "auto")
        clips = method not in ("percentile", "mse", "entropy") and getattr(params, "algorithm", "") != "nncf"
        yield Diagnostic(
            "activation outliers",
            paths,
            f"the input of {paths[0]} reaches {max(abs(statistics.low), abs(statistics.high)):.3g}, "
            f"{ratios[nodes[0]]:.1f} times its 99.9th percentile of {statistics.typical:.3g}"
            + _layer_count(ratios, "layers have such inputs"),
            "clip the range (range_method percentile or mse), or keep these layers in float",
            nodes,
            {"range_method": "percentile"} if clips else {},
        )


def _spread_weights(simulation: Simulation, params: Any) -> Iterator[Diagnostic]:
    """Find per-tensor weights whose output channels have uneven ranges."""
    if getattr(params, "granularity", "per_channel") == "per_channel":
        return
    ratios = {}
    for item in simulation.layers:
        weight = np.abs(simulation.weight(item))
        ratio = _spread(weight.max(tuple(i for i in range(weight.ndim) if i != item.axis)))
        if ratio >= CHANNEL_RATIO:
            ratios[item.layer.node] = ratio
    if ratios:
        nodes, paths = _worst(simulation, ratios)
        depthwise = any(item.is_depthwise for item in simulation.layers if item.layer.node in ratios)
        yield Diagnostic(
            "per-tensor depthwise weights" if depthwise else "per-tensor weights",
            paths,
            f"the largest output channel of {paths[0]} has {ratios[nodes[0]]:.0f} times the median range, and all "
            "share one scale" + _layer_count(ratios, "layers have such weights"),
            "granularity per_channel",
            nodes,
            {"granularity": "per_channel"},
        )


def _spread_activations(simulation: Simulation, params: Any) -> Iterator[Diagnostic]:
    """Find activations whose channels have uneven ranges: they share one scale per tensor."""
    typical = {}
    ratios = {}
    for item, statistics in _with_statistics(simulation):
        if statistics.channels.size > 1:
            powers = _column_powers(simulation.weight(item), item, statistics)
            typical[item.layer.node] = _typical_channel(statistics.channels, powers)
            ratio = float(statistics.channels.max()) / typical[item.layer.node]
            if ratio >= CHANNEL_RATIO:
                ratios[item.layer.node] = ratio
    if ratios:
        nodes, paths = _worst(simulation, ratios)
        disabled = getattr(params, "equalize", None) is False
        yield Diagnostic(
            "spread channels",
            paths,
            f"the largest input channel of {paths[0]} reaches {typical[nodes[0]] * ratios[nodes[0]]:.3g}, "
            f"{ratios[nodes[0]]:.0f} times the channels that matter most ({typical[nodes[0]]:.3g}), which get only "
            f"{max(1, round(255 / ratios[nodes[0]]))} of 255 levels" + _layer_count(ratios, "layers have such inputs"),
            "use equalize (effort balanced)"
            if disabled
            else "keep these layers in float: equalization does not reach them",
            nodes,
            {"equalize": True} if disabled else {},
        )


def _typical_channel(channels: Array, powers: Array | None) -> float:
    """Return the typical channel peak, weighted by the layer's columns; the median where those are unknown."""
    alive = channels > 0
    if not alive.any():
        return 1.0
    if powers is None or not (powers[alive] > 0).any():
        return float(np.median(channels[alive]))
    return float(np.sqrt((np.square(channels) * powers)[alive].sum() / powers[alive].sum())) or 1.0


def _column_powers(weight: Array, item: Quantizable, statistics: LayerStatistics) -> Array | None:
    """Return for every input channel the sum of squares of the weights that read it, shape (C,).

    None for a depthwise layer: its channels are not added up, so that none counts for more than another.
    """
    size = statistics.channels.size
    squares = np.square(weight, dtype=np.float64)
    if item.is_depthwise:
        return None
    if item.layer.op == "Conv":
        per_group = weight.shape[1]
        groups = size // per_group
        if groups * per_group != size or weight.shape[0] % groups:
            return None
        split = squares.reshape(groups, weight.shape[0] // groups, per_group, -1)
        powers: Array = split.sum((1, 3)).reshape(-1)
        return powers
    axis = 0 if item.layer.op == "ConvTranspose" else 1 - item.axis if weight.ndim == 2 else -1
    if axis < 0 or weight.shape[axis] != size or item.weight_position != 1:
        return None
    return np.asarray(squares.sum(tuple(i for i in range(weight.ndim) if i != axis)))


def _calibration_mismatch(simulation: Simulation, evaluation: Sequence[Mapping[str, Array]]) -> Iterator[Diagnostic]:
    calibrated, evaluated = input_ranges(simulation.batches), input_ranges(evaluation)
    worst: tuple[float, str] = (0.0, "")
    for name, (low, high) in calibrated.items():
        bounds = evaluated.get(name)
        if bounds is None:
            continue
        width, evaluated_width = high - low, bounds[1] - bounds[0]
        outside = max(low - bounds[0], bounds[1] - high, 0.0)
        ratio = max((width + outside) / width, width / evaluated_width) if width > 0 and evaluated_width > 0 else 1.0
        worst = max(worst, (ratio, name))
    if worst[0] >= RANGE_RATIO:
        low, high = calibrated[worst[1]]
        bounds = evaluated[worst[1]]
        yield Diagnostic(
            "calibration unlike evaluation",
            [worst[1]],
            f"input {worst[1]} ranges from {low:.3g} to {high:.3g} in the calibration samples and from {bounds[0]:.3g} "
            f"to {bounds[1]:.3g} in the evaluation samples",
            "calibrate on data with the preprocessing and the sources of deployment",
        )


def _with_statistics(simulation: Simulation) -> Iterator[tuple[Quantizable, LayerStatistics]]:
    for item in simulation.layers:
        statistics = simulation.statistics.get(item.activation or "")
        if statistics is not None:
            yield item, statistics


def _spread(channels: Array) -> float:
    """Return the widest channel over the median of the channels that are not dead."""
    alive = channels[channels > 0]
    return float(alive.max() / np.median(alive)) if alive.size > 1 else 1.0


def _worst(simulation: Simulation, ratios: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Return nodes and paths of the worst layers, the worst first."""
    nodes = sorted(ratios, key=lambda node: -ratios[node])[:MAX_PATHS]
    paths = {item.layer.node: item.layer.path for item in simulation.layers}
    return nodes, [paths[node] for node in nodes]


def _layer_count(ratios: Mapping[str, float], what: str) -> str:
    return f"; {len(ratios)} {what}" if len(ratios) > 1 else ""
