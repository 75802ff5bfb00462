"""Quantization sensitivity: output SQNR with one layer quantized, or all but one.

Signal-to-quantization-noise: 10 log10(sum(y^2) / sum((y - y~)^2)) over all samples, the noise-to-signal ratios of
several outputs averaged. Noise of layers adds up about linearly while it is small.
Source: the per-layer SQNR of onnxruntime.quantization's qdq_loss_debug and of arXiv:2106.08295 (section 3), measured at
the model's output instead of the layer's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.techniques.quantize._diagnostics.layer_statistics import Quantizable
from omgoptim.techniques.quantize._diagnostics.simulation import Simulation, rounded_weight
from omgoptim.techniques.quantize._onnx.qdq import quantization_parameters
from omgoptim.techniques.quantize._ptq.state import to_decibels

MAX_LAYERS = 60
"""Maximum layers that are measured one by one, those of largest rounding error. Chosen: each costs a run."""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """Sensitivity of one layer."""

    layer: OnnxLayer
    only_layer_db: float
    """SQNR of the output with only this layer quantized."""
    measured: bool
    """False if estimated from the layer's rounding error: past `MAX_LAYERS` or the time limit."""
    restored_db: float | None = None
    """SQNR of the output with all but this layer quantized."""

    @property
    def power(self) -> float:
        """Noise-to-signal ratio at the model's output."""
        return float(10 ** (-self.only_layer_db / 10))


@dataclass(frozen=True, slots=True)
class SensitivityReport:
    """Sensitivity of every layer, the worst first, and SQNR with all quantized."""

    all_quantized_db: float
    layers: list[LayerSensitivity]
    samples: int

    @property
    def estimated(self) -> int:
        """Number of layers that were estimated."""
        return sum(not layer.measured for layer in self.layers)


def measure_sensitivity(
    simulation: Simulation,
    *,
    restored: bool = False,
    limit_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[float], None] = lambda _: None,
) -> SensitivityReport:
    """Measure the sensitivity of each layer.

    Args:
        simulation: of the program, with its samples.
        restored: whether to also measure with all but one layer quantized: twice the work.
        limit_s: seconds after which layers are estimated instead: from their own rounding, on the scale of those
            measured.
        clock: seconds from any start.
        progress: `progress(fraction)` of the layers, 0..1.
    """
    start = clock()
    local = {item.layer.node: local_noise(simulation, item) for item in simulation.layers}
    order = sorted((item.layer for item in simulation.layers), key=lambda layer: -local[layer.node])
    all_layers = {layer.node for layer in order}
    all_quantized_db = simulation.sqnr(all_layers)
    measured_db: dict[str, float] = {}
    for index, layer in enumerate(order[:MAX_LAYERS]):
        if index and clock() - start >= limit_s:
            break
        measured_db[layer.node] = simulation.sqnr({layer.node})
        progress(index / min(len(order), MAX_LAYERS))
    propagation = [10 ** (-db / 10) / max(local[node], 1e-12) for node, db in measured_db.items()]
    scale = float(np.median(propagation)) if propagation else 1.0
    found = [
        LayerSensitivity(layer, measured_db[layer.node], True)
        if layer.node in measured_db
        else LayerSensitivity(layer, to_decibels(local[layer.node] * scale), False)
        for layer in order
    ]
    found.sort(key=lambda entry: entry.only_layer_db)
    if restored:
        for index, entry in enumerate(found[:MAX_LAYERS]):
            if index and clock() - start >= limit_s:
                break
            restored_db = simulation.sqnr(all_layers - {entry.layer.node})
            found[index] = LayerSensitivity(entry.layer, entry.only_layer_db, entry.measured, restored_db)
    return SensitivityReport(all_quantized_db, found, simulation.samples)


def local_noise(simulation: Simulation, item: Quantizable) -> float:
    """Return the noise-to-signal ratio of one layer's weight and input rounding."""
    weight, rounding = simulation.weight(item), simulation.rounding
    signal = float(np.square(weight, dtype=np.float64).sum()) or 1.0
    lost = float(np.square(weight - rounded_weight(weight, item.axis, rounding), dtype=np.float64).sum())
    statistics = simulation.statistics.get(item.activation or "")
    if statistics is None or statistics.power <= 0:
        return lost / signal
    scale, _ = quantization_parameters((statistics.low, statistics.high), rounding.symmetric)
    return lost / signal + scale**2 / 12 / statistics.power
