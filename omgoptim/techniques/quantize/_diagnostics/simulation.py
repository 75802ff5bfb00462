"""Simulated quantization: a float program in one session, with a switch per layer.

What is simulated: a layer's input (and its output, where the writer of the algorithm rounds that) through
QuantizeLinear and DequantizeLinear with its range over the samples, its weight replaced by what int8 leaves of it, on
the program with its channels scaled where the technique scales them. Ranges are plain minima and maxima; what bias
correction, chosen ranges or learned rounding repair is not in it, nor is what lies between layers (additions). It only
ranks layers; candidates are evaluated as written programs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from omgoptim.errors import OmgoptimError
from omgoptim.models.onnx_file import initializers, replace_nodes
from omgoptim.models.onnx_graph import OnnxLayer, find_layers, select_layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._diagnostics.layer_statistics import (
    LayerStatistics,
    Quantizable,
    collect_statistics,
    load_folded,
    quantizable_layers,
    take_samples,
)
from omgoptim.techniques.quantize._onnx.program import as_technique_error, open_program, weight_levels
from omgoptim.techniques.quantize._onnx.qdq import quantization_parameters
from omgoptim.techniques.quantize._ptq.equalization import SHARES, equalize_channels
from omgoptim.techniques.quantize._ptq.state import sqnr_db

Array = NDArray[Any]

SAMPLES = 48
"""Samples that noise is measured on. Chosen by time: each layer runs them all."""

NON_FINITE_DB = 0.0
"""SQNR of an output that is not finite where the original is: all noise."""

SWITCHES = "omgoptim.quantized"
"""Name of the added program input: one bool per layer, True where it is quantized."""


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """Number format of the simulated layers."""

    per_channel: bool = True
    symmetric: bool = False
    """True for activations with a zero point of 0."""
    weight_levels: int = 127
    """Largest integer of a weight."""
    outputs: bool = True
    """True to round layer outputs too, as ONNX Runtime's writer does; False for inputs only, as NNCF's."""

    @classmethod
    def of(cls, params: Any) -> SimulationConfig:
        """Create the configuration for params of calibrated int8 on this processor."""
        per_channel = getattr(params, "granularity", "per_channel") == "per_channel"
        outputs = getattr(params, "algorithm", "auto") != "nncf"
        return cls(per_channel, getattr(params, "symmetric", False), weight_levels(), outputs)


class Simulation:
    """Session of a program whose layers can be quantized one by one.

    Args:
        model: the float program, folded.
        chosen: the layers that get a switch.
        batches: few samples, none of them evaluation data.
    """

    def __init__(
        self,
        model: ModelProto,
        chosen: Sequence[OnnxLayer],
        batches: Sequence[Mapping[str, Array]],
        rounding: SimulationConfig,
        threads: int = 1,
    ) -> None:
        self.model, self.batches, self.rounding = model, batches, rounding
        self.layers = quantizable_layers(model, chosen)
        self.statistics = collect_statistics(model, self.layers, batches, threads, rounding.outputs)
        self._index = {item.layer.node: i for i, item in enumerate(self.layers)}
        self._session = open_program(
            switchable(model, self.layers, self.statistics, rounding), threads, "ORT_ENABLE_BASIC"
        )
        self._original = [self.outputs((), batch) for batch in batches]

    @property
    def samples(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.batches)

    @property
    def nodes(self) -> set[str]:
        """Return the names of the nodes that have a switch."""
        return set(self._index)

    def weight(self, item: Quantizable) -> Array:
        """Return a layer's float weight."""
        return np.asarray(numpy_helper.to_array(initializers(self.model)[item.layer.weight]))

    def outputs(self, nodes: Collection[str], batch: Mapping[str, Array]) -> list[Array]:
        """Return the outputs on a batch with these nodes quantized."""
        switches = np.zeros(max(1, len(self.layers)), bool)
        switches[[self._index[node] for node in nodes]] = True
        with as_technique_error("ONNX Runtime cannot run the program with simulated quantization"):
            return list(self._session.run(None, {**batch, SWITCHES: switches}))

    def sqnr(self, nodes: Collection[str]) -> float:
        """Return the SQNR of the output, in dB, with the layers of these node names quantized."""
        return sqnr_db(self._original, [self.outputs(nodes, batch) for batch in self.batches], NON_FINITE_DB)


def build_simulation(
    source: Path,
    batches: Sequence[Mapping[str, Array]],
    params: Any,
    *,
    samples: int = SAMPLES,
    threads: int = 1,
    rounding: SimulationConfig | None = None,
) -> Simulation:
    """Build the simulation of these params on the float program `source`.

    Channels are equalized as the technique would do it, unless `params.equalize` is off or the algorithm has its own
    method: of the original program and its equalized forms, the one with the highest SQNR is simulated.

    Args:
        source: file of the float program.
        batches: calibration inputs by name.
        params: of calibrated int8: `targets`, `ignore`, `granularity`, `symmetric`, `equalize`, those that it has.
        samples: how many to keep for later measurements, at most.
        threads: of ONNX Runtime.
        rounding: default: as params ask.

    Raises:
        TechniqueError: a glob names no layer, or the program does not run.
    """
    model, layers = load_folded(source, threads)
    paths = {layer.node: layer.path for layer in layers}
    rounding = rounding or SimulationConfig.of(params)
    subset = take_samples(model, batches, samples)

    def chosen(program: ModelProto) -> list[OnnxLayer]:
        selected = select_layers(
            find_layers(program, paths), getattr(params, "targets", []), getattr(params, "ignore", [])
        )
        return [layer for layer in selected if not layer.is_quantized]

    best = Simulation(model, chosen(model), subset, rounding, threads)
    scales = getattr(params, "equalize", False) is not False and getattr(params, "algorithm", "auto") != "nncf"
    for share in SHARES if scales and best.layers else ():
        try:
            with as_technique_error("cross-layer equalization failed"):
                granularity = Static(granularity="per_channel" if rounding.per_channel else "per_tensor")
                scaled, count = equalize_channels(model, chosen(model), granularity, share, batches=subset)
        except OmgoptimError:  # the technique would leave them, too
            break
        if count:
            other = Simulation(scaled, chosen(scaled), subset, rounding, threads)
            best = max(best, other, key=lambda simulation: simulation.sqnr(simulation.nodes))
    return best


def rounded_weight(weight: Array, axis: int, rounding: SimulationConfig) -> Array:
    """Quantize and dequantize a weight in symmetric int8: a scale per entry of `axis`, or one for all."""
    reduced = tuple(i for i in range(weight.ndim) if i != axis) if rounding.per_channel else None
    largest = np.abs(weight).max(axis=reduced, keepdims=True)
    scale = np.where(largest > 0, largest / rounding.weight_levels, 1.0)
    quantized: Array = (np.rint(weight / scale) * scale).astype(np.float32)
    return quantized


def switchable(
    model: ModelProto,
    layers: Sequence[Quantizable],
    statistics: Mapping[str, LayerStatistics],
    rounding: SimulationConfig,
) -> ModelProto:
    """Add an input to the program: a bool per layer, whether that layer is quantized."""
    result = deepcopy(model)
    graph = result.graph
    graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [max(1, len(layers))]))
    stored = initializers(model)
    items = {item.layer.node: (index, item) for index, item in enumerate(layers)}
    prefixes = {item.output: f"omgoptim.{index}." for index, item in enumerate(layers) if rounding.outputs}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        copy = deepcopy(node)
        if node.name in items:
            index, item = items[node.name]
            _switch(copy, _Writer(graph, nodes, f"omgoptim.{index}.", rounding), index, item, stored, statistics)
        nodes.append(copy)
        for place, name in enumerate(node.output):
            if name in prefixes and name in statistics:
                copy.output[place] = f"{prefixes[name]}raw"
                writer = _Writer(graph, nodes, prefixes[name], rounding)
                writer.round(f"{prefixes[name]}raw", "output", statistics[name], name)
    replace_nodes(graph, nodes)
    return result


@dataclass(frozen=True, slots=True)
class _Writer:
    """Appends constants and nodes of one layer under names of their own."""

    graph: GraphProto
    nodes: list[NodeProto]
    prefix: str
    rounding: SimulationConfig

    def constant(self, name: str, value: Array) -> str:
        self.graph.initializer.append(numpy_helper.from_array(value, self.prefix + name))
        return self.prefix + name

    def add(self, op: str, inputs: Sequence[str], name: str, output: str = "") -> str:
        output = output or self.prefix + name
        self.nodes.append(helper.make_node(op, inputs, [output], self.prefix + name + "_node"))
        return output

    def round(self, tensor: str, name: str, statistics: LayerStatistics, output: str = "") -> str:
        """Round a tensor if the layer's switch is on; the switch was read before."""
        scale, zero = quantization_parameters((statistics.low, statistics.high), self.rounding.symmetric)
        grid = [
            self.constant(f"{name}_scale", np.array(scale, np.float32)),
            self.constant(f"{name}_zero", np.array(zero, np.int8 if self.rounding.symmetric else np.uint8)),
        ]
        integers = self.add("QuantizeLinear", [tensor, *grid], f"{name}_integers")
        restored = self.add("DequantizeLinear", [integers, *grid], f"{name}_rounded")
        return self.add("Where", [f"{self.prefix}on", restored, tensor], f"{name}_chosen", output)


def _switch(
    node: NodeProto,
    writer: _Writer,
    index: int,
    item: Quantizable,
    stored: Mapping[str, TensorProto],
    statistics: Mapping[str, LayerStatistics],
) -> None:
    """Connect a layer's node to the switched tensors."""
    on = writer.add("Gather", [SWITCHES, writer.constant("index", np.array(index, np.int64))], "on")
    weight = numpy_helper.to_array(stored[item.layer.weight])
    rounded = writer.constant("weight", rounded_weight(weight, item.axis, writer.rounding))
    node.input[item.weight_position] = writer.add("Where", [on, rounded, item.layer.weight], "weight_chosen")
    activation = statistics.get(item.activation or "")
    if activation is not None and item.activation:
        node.input[1 - item.weight_position] = writer.round(item.activation, "input", activation)
