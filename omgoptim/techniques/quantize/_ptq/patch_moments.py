"""Second moments of layer inputs: sufficient statistics for the error of a layer's output.

With y = w x the wanted output (float weights on float inputs) and x^ the input that the layer will get (of the
quantized program before it), the error of weights v is quadratic:

    E (v x^ - w x)^2 = v A v^T - 2 v t + const,   A_KK = E[x^ x^T^],   t_OK = E[y_O x^_K]

so that two matrices stand for the data, whatever its amount. K runs over a patch: input channels of a group x taps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.models.onnx_file import attribute
from omgoptim.techniques.quantize._onnx.layer_weights import LayerWeight
from omgoptim.techniques.quantize._onnx.qdq import nodes_by_name
from omgoptim.techniques.quantize._ptq.calibration import ActivationReader, Batch, size_of

MAX_PATCHES = 16384
"""Maximum patches per layer, drawn at random. Chosen: several times a patch's values, for moments of full rank."""

MIN_PATCHES = 1024
"""Minimum number of patches per layer, whatever they cost. Chosen: below it moments are noise."""


@dataclass(slots=True)
class PatchMoments:
    """Sums over patches; G groups, O outputs of a group, K values of a patch."""

    xx_GKK: NDArray[np.float64]
    yx_GOK: NDArray[np.float64]
    x_GK: NDArray[np.float64]
    y_GO: NDArray[np.float64]
    count: int = 0

    @classmethod
    def empty(cls, groups: int, outputs: int, patch: int) -> PatchMoments:
        yx, x, y = (np.zeros(shape) for shape in ((groups, outputs, patch), (groups, patch), (groups, outputs)))
        return cls(np.zeros((groups, patch, patch)), yx, x, y)

    def add(self, x_PGK: NDArray[np.float32], y_PGO: NDArray[np.float32]) -> None:
        x_GPK, y_GPO = (part.swapaxes(0, 1).astype(np.float64) for part in (x_PGK, y_PGO))  # means will be taken off
        self.xx_GKK += x_GPK.swapaxes(1, 2) @ x_GPK
        self.yx_GOK += y_GPO.swapaxes(1, 2) @ x_GPK
        self.x_GK += x_GPK.sum(1, dtype=np.float64)
        self.y_GO += y_GPO.sum(1, dtype=np.float64)
        self.count += len(x_PGK)

    def shift(self, v_GOK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return E[y] - v E[x^], (G, O): the mean error that the bias has to correct."""
        sums: NDArray[np.float64] = self.y_GO - np.einsum("gok,gk->go", v_GOK, self.x_GK)
        return sums / max(self.count, 1)

    def quadratic(self, centred: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return A_GKK and t_GOK; centred, the error's mean is left to the bias."""
        count = max(self.count, 1)
        a, t = self.xx_GKK / count, self.yx_GOK / count
        if centred:
            x, y = self.x_GK / count, self.y_GO / count
            a, t = a - x[:, :, None] * x[:, None, :], t - y[:, :, None] * x[:, None, :]
        return a, t


def patches(layer: LayerWeight, x: NDArray[np.float32], keep: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Extract the patches (P, G, K) that a layer multiplies with its weights.

    Args:
        layer: its weight, strides, pads and groups.
        x: the layer's input: (N, C, *space) for a Conv, (..., K) for Gemm and MatMul.
        keep: numbers of the patches to take, counted over samples and then places; None: all.
    """
    if layer.node.op_type != "Conv":
        rows = x.reshape(-1, x.shape[-1])
        return (rows if keep is None else rows[keep])[:, None, :]
    windows = _windows(layer, x)
    space = windows.shape[2 : 2 + x.ndim - 2]
    places = (len(x), *space)
    chosen = np.unravel_index(np.arange(int(np.prod(places))) if keep is None else keep, places)
    index: tuple[Any, ...] = (chosen[0], slice(None), *chosen[1:])
    taken = windows[index]
    return np.ascontiguousarray(taken).reshape(len(taken), layer.groups, -1)


def patch_count(layer: LayerWeight, x: NDArray[np.float32]) -> int:
    """Count the patches of an input."""
    if layer.node.op_type != "Conv":
        return int(x.size // x.shape[-1])
    windows = _windows(layer, x)
    return int(len(x) * np.prod(windows.shape[2 : 2 + x.ndim - 2]))


def is_readable(layer: LayerWeight) -> bool:
    """Return whether patches of the layer can be read: explicit padding, no transposed convolution."""
    padding: bytes = attribute(layer.node, "auto_pad", b"NOTSET")
    return layer.node.op_type != "ConvTranspose" and padding == b"NOTSET"


@dataclass(frozen=True, slots=True)
class MomentOptions:
    """Settings of the collection of moments."""

    own_rounding_only: Collection[str] = ()
    """Names of layers whose y is computed from x^, so that only their own rounding is an error: those whose inputs will
    still change."""
    exact: bool = True
    """True if the quantized program holds integers, which the engine must not fuse."""
    values: int | None = None
    """About how many patch values are read per layer; None: `MAX_PATCHES` patches, whatever their size."""
    seed: int = 0
    threads: int = 1


def collect_moments(
    layers: Sequence[LayerWeight],
    quantized: ModelProto,
    reference: ModelProto,
    weights: Mapping[str, NDArray[np.float32]],
    batches: Sequence[Batch],
    options: MomentOptions,
) -> dict[str, PatchMoments]:
    """Collect the moments of every layer, by its node's name.

    Args:
        layers: those to collect for.
        quantized: the QDQ program, from which x^ is read.
        reference: the float program, from which x is read.
        weights: the float weights w_GOIT that make y of x.
        batches: inputs of the programs by name.
        options: limits of samples and memory.
    """
    own_rounding_only, threads = options.own_rounding_only, options.threads
    quantized_inputs = {layer.name: nodes_by_name(quantized)[layer.name].input[0] for layer in layers}
    float_inputs = {
        layer.name: nodes_by_name(reference)[layer.name].input[0]
        for layer in layers
        if layer.name not in own_rounding_only
    }
    quantized_reader = ActivationReader(
        quantized, list(dict.fromkeys(quantized_inputs.values())), exact=options.exact, threads=threads
    )
    float_reader = (
        ActivationReader(reference, list(dict.fromkeys(float_inputs.values())), exact=True, threads=threads)
        if float_inputs
        else None
    )
    samples = max(1, sum(size_of(batch) for batch in batches))
    rng = np.random.default_rng(options.seed)
    moments: dict[str, PatchMoments] = {}
    for part, values in quantized_reader.slices(batches):
        floats = float_reader.run(part) if float_reader is not None else {}
        for layer in layers:
            x, w_GOIT = values[quantized_inputs[layer.name]], weights[layer.name]
            total = patch_count(layer, x)
            share = -(-_most_patches(w_GOIT, options.values) * size_of(part) // samples)
            keep = None if total <= share else rng.choice(total, share, replace=False)
            w_GOK = w_GOIT.reshape(*w_GOIT.shape[:2], -1)
            x_PGK = patches(layer, x, keep)
            floats_PGK = patches(layer, floats[float_inputs[layer.name]], keep) if layer.name in float_inputs else x_PGK
            y_PGO = (floats_PGK.swapaxes(0, 1) @ w_GOK.swapaxes(1, 2)).swapaxes(0, 1)
            if layer.name not in moments:
                moments[layer.name] = PatchMoments.empty(*w_GOK.shape)
            moments[layer.name].add(x_PGK, y_PGO)
    return moments


def _most_patches(w_GOIT: NDArray[np.float32], values: int | None) -> int:
    size = w_GOIT.size // w_GOIT.shape[1]  # values of a patch, all groups
    return MAX_PATCHES if values is None else min(MAX_PATCHES, max(MIN_PATCHES, values // size))


def _windows(layer: LayerWeight, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a view (N, C, *places, *taps) of a convolution's padded input."""
    space = x.ndim - 2
    taps = list(layer.weight.dims[2:])
    strides, dilations = (attribute(layer.node, name, [1] * space) for name in ("strides", "dilations"))
    pads = attribute(layer.node, "pads", [0] * (2 * space))
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:space], pads[space:], strict=True)])
    spans = [(tap - 1) * step + 1 for tap, step in zip(taps, dilations, strict=True)]
    windows = sliding_window_view(padded, spans, axis=tuple(range(2, x.ndim)))
    places = tuple(slice(None, None, stride) for stride in strides)
    inside = tuple(slice(None, None, step) for step in dilations)
    index: tuple[Any, ...] = (slice(None), slice(None), *places, *inside)
    return np.asarray(windows[index])
