"""QAT state: the activation ranges and channel scaling of a quantization-aware training, stored in the ONNX metadata.

The float program alone does not determine them: training may rely on values being clipped, and ranges observed on the
float program's own activations would be others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.models.onnx_file import is_large, load
from omgoptim.models.onnx_graph import OnnxLayer, find_layers, has_attention, module_paths, select_layers
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.layer_weights import find_layer_weights
from omgoptim.techniques.quantize._onnx.preparation import prepare_with_shapes
from omgoptim.techniques.quantize._onnx.qdq import Range
from omgoptim.techniques.quantize._ptq.calibration import Batch
from omgoptim.techniques.quantize._ptq.equalization import channel_peaks, equalize_channels
from omgoptim.techniques.quantize._ptq.equalization_groups import EqualizationGroup, find_groups

KEY = "omgoptim.learned"

Peaks = Mapping[str, NDArray[np.float32]]
"""Tensor name to the largest absolute value of each of its channels."""


@dataclass(frozen=True, slots=True)
class ChannelScaling:
    """Channel scaling of training and conversion."""

    peaks: Peaks = field(default_factory=dict)
    """Channel peaks from which `equalize_channels` derives the factors."""
    factors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Layer path to the factors that its input channels are divided by."""


@dataclass(frozen=True, slots=True)
class QatState:
    """Input ranges of trained layers by path, after equalization, and the channel peaks it was computed from."""

    ranges: Mapping[str, Range]
    peaks: Peaks = field(default_factory=dict)


def write_qat_state(program: Path, state: QatState) -> None:
    """Write QAT state to the metadata of a program file."""
    model = onnx.load(str(program), load_external_data=False)
    peaks = {name: array.tolist() for name, array in state.peaks.items()}
    onnx.helper.set_model_props(model, {KEY: json.dumps({"ranges": dict(state.ranges), "peaks": peaks})})
    onnx.save(model, str(program))


def read_qat_state(model: ModelProto) -> QatState | None:
    """Read the QAT state of a program; None where it has none."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    if text is None:
        return None
    stored = json.loads(text)
    ranges = {path: (float(low), float(high)) for path, (low, high) in stored["ranges"].items()}
    return QatState(ranges, {name: np.asarray(values, np.float32) for name, values in stored["peaks"].items()})


def compute_scaling(
    source: Path, params: Static, batches: Sequence[Batch], scratch: Path, threads: int = 1
) -> ChannelScaling:
    """Compute the channel scaling that equalizes the ranges of a float program on these batches.

    It is the ratio of a channel's largest value before and after. Empty for networks with attention and for those above
    two gigabytes, which ONNX Runtime's path does not equalize.

    Args:
        source: file of the float program.
        params: number format and granularity.
        batches: calibration inputs by name.
        scratch: an existing folder.
        threads: of ONNX Runtime.
    """
    original = load(source)
    if is_large(original) or has_attention(original):
        return ChannelScaling()
    model = prepare_with_shapes(load(source), scratch)
    chosen = select_layers(find_layers(model, module_paths(original)), params.targets, params.ignore)
    groups = _groups(model, chosen)
    peaks = channel_peaks(model, groups, batches, threads)
    scaled, _ = equalize_channels(model, chosen, params, 1.0, peaks)
    peaks_after = channel_peaks(scaled, groups, batches, threads)
    paths = {layer.node: layer.path for layer in chosen}
    factors: dict[str, NDArray[np.float32]] = {}
    for group in groups:
        for reader in group.readers:
            peak_before, peak_after = peaks[reader.node.input[0]], peaks_after[reader.node.input[0]]
            alive = (peak_before > 0) & (peak_after > 0)
            factors[paths[reader.name]] = np.where(alive, peak_before / np.where(alive, peak_after, 1), 1).astype(
                np.float32
            )
    return ChannelScaling(peaks, factors)


def apply_trained_scaling(
    model: ModelProto, chosen: Sequence[OnnxLayer], params: Static, state: QatState
) -> ModelProto:
    """Equalize the prepared float program with the factors of the training."""
    needed = {name for group in _groups(model, chosen) for name in group.tensors}
    if not needed or not needed <= set(state.peaks):
        return model
    return equalize_channels(model, chosen, params, 1.0, state.peaks)[0]


def with_trained_ranges(
    ranges: Mapping[str, Range], model: ModelProto, chosen: Sequence[OnnxLayer], state: QatState
) -> dict[str, Range]:
    """Replace the ranges of trained layers' inputs by the trained ones.

    Several layers that read one tensor share the widest of their ranges.
    """
    inputs = {node.name: node.input[0] for node in model.graph.node if node.input}
    trained: dict[str, Range] = {}
    for layer in chosen:
        if layer.path in state.ranges:
            low, high = state.ranges[layer.path]
            known = trained.get(inputs[layer.node], (low, high))
            trained[inputs[layer.node]] = min(low, known[0]), max(high, known[1])
    return {name: trained.get(name, bounds) for name, bounds in ranges.items()}


def _groups(model: ModelProto, chosen: Sequence[OnnxLayer]) -> list[EqualizationGroup]:
    return find_groups(model, find_layer_weights(model, chosen))
