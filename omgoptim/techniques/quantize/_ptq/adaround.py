"""AdaRound: choose between rounding up and down for each weight so that the error of the layer's output is least.

Rounding to nearest is best for a single weight; the errors of several weights can add up. With v = s (floor(w / s) + h)
the output error is quadratic in h (`patch_moments.py`). It is minimized over h = clip(1.2 sigmoid(V) - 0.1, 0, 1) with
a regularizer 1 - |2h - 1|^beta that drives h to 0 or 1 as beta falls; then single weights are flipped while that lowers
the error. Of rounding to nearest, AdaRound and sequential rounding (as GPTQ), the one with the least error on held-out
moments is kept, row by row.

Layers are rounded in graph order, each on the inputs that the rounded and bias-corrected layers before it give. The
result is a float program whose weights lie on the integer grid, so that rounding to nearest gives exactly the chosen
integers: the largest weight of a scale stays, and with it the scale.

Source: arXiv:2004.10568. Differs: the loss leaves the activation function out, which makes it exact from second
moments without data at hand; the flips after it; and the choice on held-out samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from omgoptim.techniques.quantize._onnx.layer_weights import LayerWeight, bias_of, find_layer_weights, set_bias
from omgoptim.techniques.quantize._onnx.program import has_free_batch, weight_levels
from omgoptim.techniques.quantize._onnx.qdq import (
    Range,
    StoredWeight,
    nodes_by_name,
    set_integers,
    stored_weights,
    write_qdq,
)
from omgoptim.techniques.quantize._ptq.calibration import Batch, subsample
from omgoptim.techniques.quantize._ptq.patch_moments import MomentOptions, PatchMoments, collect_moments, is_readable
from omgoptim.techniques.quantize._ptq.state import PtqTask

STEPS, RATE = 400, 0.05
"""Steps of Adam and its learning rate for the logits of the rounding. Chosen: AIMET, the authors' code, takes 10,000
(`default_num_iterations`), each on a batch; here each step sees all samples, as moments."""

MAX_LAYER_MACS = 5e11
"""Limit of the multiply-accumulates of one layer's optimization; beyond it a layer is only flipped. Chosen: 15 s at the
rate of `RANGE_SEARCH_MACS`."""

REGULARIZER_WEIGHT, WARM_UP = 0.05, 0.2
"""Weight of the rounding regularizer; share of the steps before it begins. The share is AIMET's `default_warm_start`.
Its weight of 0.01 (`default_reg_param`) is for an error in the outputs' units; here it is in units of the weights'
scale and of the inputs' mean energy."""

BETA_FROM, BETA_TO = 20.0, 2.0
"""Annealing of the regularizer's exponent, as in the authors' code (AIMET, `default_beta_range`)."""

DAMPING = 0.01
"""Damping, as a fraction of the mean of A's diagonal, as in arXiv:2210.17323: directions without samples count as
uncorrelated.
"""

MIN_RELATIVE_VARIANCE = 1e-6
"""Minimum variance of an input over its mean square: that of a single patch is 0. Chosen near float32's precision."""

MAX_PATCH = 4608
"""Maximum values of a patch, a 3x3 kernel on 512 channels. Chosen by memory: its second moments take 170 MB."""

MAX_PASSES = 32
"""Maximum passes over the data. Chosen by time: with more layers, neighbours share a pass, and all but the first of
them account for their own rounding only."""

SMALL_PATCH = 64
"""Values of a patch up to which a kernel counts as small. Chosen: few rounding errors do not average out; depthwise
kernels up to 8x8 and first 3x3 convolutions (27) are small."""

SMALL_VALUES = 2**23
"""Patch values of a layer that are read for a small kernel. Chosen: 131,072 patches of 64, many for the 2,080 different
moments."""

SMALL_SAMPLES = 64
"""Samples for the moments of a small kernel. Chosen by time."""


def round_weights(
    w_GOK: NDArray[np.float64],
    fit: PatchMoments,
    held_out: PatchMoments,
    *,
    highest: int = 127,
    centred: bool = True,
    steps: int = STEPS,
) -> NDArray[np.int32]:
    """Return the integers (G, O, K) of least output error for weights in units of their scale.

    Args:
        w_GOK: w / s; at most `highest` in size, and where it is that, it stays: the scale is read off it.
        fit: moments to minimize the error on; y in units of the scale.
        held_out: moments to choose by, in the same units.
        highest: the largest integer, 2 ** (num_bits - 1) - 1.
        centred: whether the bias takes the mean error back.
        steps: of gradient descent; 0: only sequential rounding and flips.
    """
    a_GKK, t_GOK = (torch.from_numpy(array) for array in fit.quadratic(centred))
    w = torch.from_numpy(w_GOK)
    floor = MIN_RELATIVE_VARIANCE * fit.quadratic(False)[0].diagonal(axis1=1, axis2=2).mean(1) + 1e-30
    scale = torch.maximum(a_GKK.diagonal(dim1=1, dim2=2).mean(1), torch.from_numpy(floor))[:, None, None]
    a_GKK = a_GKK / scale + DAMPING * torch.eye(a_GKK.shape[-1], dtype=a_GKK.dtype)
    t_GOK = t_GOK / scale + DAMPING * w
    nearest = w.round().clamp(-highest, highest)
    fixed = (w.abs() > highest - 0.5) | (w == w.round())
    sequential = round_sequentially(w, fixed, a_GKK, t_GOK)
    candidates = [nearest] + [flip_greedily(start, w, fixed, a_GKK, t_GOK) for start in (nearest, sequential)]
    affordable = int(min(steps, MAX_LAYER_MACS / (2.0 * t_GOK.numel() * t_GOK.shape[-1])))
    if affordable >= max(1, min(steps, 100)):
        soft = optimize_rounding(w, fixed, a_GKK.float(), t_GOK.float(), affordable)
        hard = torch.where(fixed, nearest, w.floor() + (soft >= 0.5)).clamp(-highest, highest)
        candidates.append(flip_greedily(hard, w, fixed, a_GKK, t_GOK))
    a, t = (torch.from_numpy(array) for array in held_out.quadratic(centred))
    best = torch.stack([output_error(q, a, t) for q in candidates]).argmin(0)  # (G, O)
    chosen = torch.stack(candidates).gather(0, best[None, :, :, None].expand(1, *w.shape))[0]
    return chosen.numpy().astype(np.int32)


def output_error(q_GOK: Tensor, a_GKK: Tensor, t_GOK: Tensor) -> Tensor:
    """Return q A q^T - 2 q t of every row, (G, O): the output error less a constant."""
    return ((q_GOK @ a_GKK - 2 * t_GOK) * q_GOK).sum(-1)


def round_sequentially(w_GOK: Tensor, fixed: Tensor, a_GKK: Tensor, t_GOK: Tensor) -> Tensor:
    """Round weight by weight and compensate the error in the remaining weights, as GPTQ does.

    With U the upper Cholesky factor of A^-1, the best change of the weights k.. for an error e of weight k is
    -e U_k / U_kk, as in arXiv:2210.17323; here no weight leaves the integers below and above it.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(a_GKK))
    upper = torch.linalg.cholesky(inverse, upper=True)
    target = t_GOK @ inverse
    low, nearest = w_GOK.floor(), w_GOK.round()
    q = nearest.clone()
    for k in range(w_GOK.shape[-1]):
        up = (target[..., k] - low[..., k]).round().clamp(0, 1)
        q[..., k] = torch.where(fixed[..., k], nearest[..., k], low[..., k] + up)
        error = (target[..., k] - q[..., k]) / upper[:, None, k, k]
        target[..., k:] -= error[..., None] * upper[:, None, k, k:]
    return q


def optimize_rounding(w: Tensor, fixed: Tensor, a_GKK: Tensor, t_GOK: Tensor, steps: int) -> Tensor:
    """Return h in 0..1, (G, O, K), after `steps` of Adam."""
    low = w.floor().float()
    fraction = (w - w.floor()).float().clamp(0.01, 0.99)
    logits = torch.logit((fraction + 0.1) / 1.2).requires_grad_()
    optimizer = torch.optim.Adam([logits], RATE)
    frozen = w.round().float() - low
    with torch.enable_grad():
        for step in range(steps):
            h = torch.where(fixed, frozen, (1.2 * torch.sigmoid(logits) - 0.1).clamp(0, 1))
            loss = output_error(low + h, a_GKK, t_GOK).sum()
            progress = (step / steps - WARM_UP) / (1 - WARM_UP)
            if progress > 0:
                beta = BETA_TO + (BETA_FROM - BETA_TO) * 0.5 * (1 + np.cos(np.pi * progress))
                loss = loss + REGULARIZER_WEIGHT * (1 - (2 * h - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return (1.2 * torch.sigmoid(logits.detach()) - 0.1).clamp(0, 1)


def flip_greedily(q_GOK: Tensor, w_GOK: Tensor, fixed: Tensor, a_GKK: Tensor, t_GOK: Tensor) -> Tensor:
    """Flip one weight of every row to its other integer, the one that lowers the error most, until none does.

    A flip by d = +-1 changes the error by 2 d (q A - t) + A_kk.
    """
    q = q_GOK.clone()
    groups, outputs, size = q.shape
    low = w_GOK.floor()
    slope = q @ a_GKK - t_GOK
    diagonal = a_GKK.diagonal(dim1=1, dim2=2)[:, None, :]
    group = torch.arange(groups)[:, None].expand(groups, outputs)
    for _ in range(2 * size):
        direction = torch.where(q > low, -1.0, 1.0).to(q.dtype)
        change = (2 * direction * slope + diagonal).masked_fill(fixed, 0.0)
        largest_drop, at = change.min(-1)
        better = largest_drop < -1e-9
        if not better.any():
            break
        move = torch.where(better, direction.gather(-1, at[..., None])[..., 0], 0.0)
        q.scatter_add_(-1, at[..., None], move[..., None])
        slope += move[..., None] * a_GKK[group, at]
    return q


@dataclass(frozen=True, slots=True)
class RoundingResult:
    """Program with rounded weights, and its layers."""

    model: ModelProto
    changed: list[str]
    """Node names of layers with a weight that is not rounded to nearest."""
    unsupported: list[str]
    """Node names of layers that were left out: too large a patch, or an operator without patches."""


@dataclass(slots=True)
class RoundingTask:
    """Programs that are rounded together: float, its QDQ form if it is executed, and the float reference."""

    result: ModelProto
    simulated: ModelProto | None
    reference: ModelProto
    stored: Mapping[str, StoredWeight]
    biases: Mapping[str, NDArray[np.float32] | None]
    """Bias of the reference; None where the layer has none that can be changed."""


def apply_adaround(
    model: ModelProto,
    reference: ModelProto,
    ranges: Mapping[str, Range],
    fit: Sequence[Batch],
    held_out: Sequence[Batch],
    task: PtqTask,
) -> RoundingResult:
    """Round the weights of a copy of the float program by AdaRound, and correct its biases.

    Args:
        model: the program to round; its biases may be corrected already.
        reference: the float program with the weights and biases before any rounding.
        ranges: of the tensors, by name.
        fit: batches to learn the rounding on.
        held_out: batches to choose between the ways of rounding by.
        task: layers, number format and threads.
    """
    chosen, params = task.chosen, task.params
    result = deepcopy(model)
    simulated = write_qdq(model, chosen, ranges, params, float_biases=True)
    stored = stored_weights(simulated)
    floats = {layer.name: layer for layer in find_layer_weights(reference, chosen)}
    biases = {name: bias_of(reference, layer) if params.bias_correction else None for name, layer in floats.items()}
    work = RoundingTask(result, simulated, reference, stored, biases)
    candidates = [layer for layer in find_layer_weights(result, chosen) if layer.name in stored]
    layers = [layer for layer in candidates if is_readable(layer) and _patch_size(layer) <= MAX_PATCH]
    count = max(1, -(-len(layers) // MAX_PASSES))
    integers: dict[str, NDArray[np.int32]] = {}
    for start in range(0, len(layers), count):
        task.progress("AdaRound", start / len(layers))
        block = layers[start : start + count]
        units = {layer.name: floats[layer.name].read() / _scales(layer, stored[layer.name]) for layer in block}
        options = MomentOptions({layer.name for layer in block[1:]}, seed=task.seed, threads=task.threads)
        parts = [collect_moments(block, simulated, reference, units, batches, options) for batches in (fit, held_out)]
        for layer in block:
            integers[layer.name] = _round(work, layer, units[layer.name], parts[0][layer.name], parts[1][layer.name])
    moved = _restore_moved(write_qdq(result, chosen, ranges, params), layers, integers, floats)
    changed = [
        layer.name
        for layer in layers
        if layer.name not in moved and (layer.arrange(stored[layer.name].integers) != integers[layer.name]).any()
    ]
    return RoundingResult(result, changed, [layer.name for layer in candidates if layer.name not in integers])


def round_small_kernels(
    model: ModelProto,
    ranges: Mapping[str, Range],
    batches: Sequence[Batch],
    task: PtqTask,
) -> RoundingResult:
    """Round the small kernels of a copy of the float program for the least output error on float inputs.

    Costs one run over a few samples, whatever the number of layers. Depthwise and first convolutions need it most:
    their taps often cancel out, so that an error of the sum of nine weights is large beside what is left.
    """
    chosen, params = task.chosen, task.params
    result = deepcopy(model)
    stored = stored_weights(write_qdq(model, chosen, ranges, params))
    layers = [
        layer
        for layer in find_layer_weights(result, chosen)
        if layer.name in stored and is_readable(layer) and _patch_size(layer) <= SMALL_PATCH
    ]
    floats = {layer.name: layer for layer in find_layer_weights(model, chosen)}
    biases = {layer.name: bias_of(model, layer) if params.bias_correction else None for layer in layers}
    work = RoundingTask(result, None, model, stored, biases)
    units = {layer.name: floats[layer.name].read() / _scales(layer, stored[layer.name]) for layer in layers}
    moments = collect_moments(
        *(layers, model, model, units, subsample(batches, SMALL_SAMPLES, sliceable=has_free_batch(model))),
        MomentOptions(set(units), exact=False, values=SMALL_VALUES, seed=task.seed, threads=task.threads),
    )
    integers = {
        layer.name: _round(work, layer, units[layer.name], moments[layer.name], moments[layer.name], steps=0)
        for layer in layers
    }
    moved = _restore_moved(write_qdq(result, chosen, ranges, params), layers, integers, floats)
    return RoundingResult(result, [name for name in integers if name not in moved], [])


def _round(
    work: RoundingTask,
    layer: LayerWeight,
    units: NDArray[np.float32],
    fit: PatchMoments,
    held_out: PatchMoments,
    steps: int = STEPS,
) -> NDArray[np.int32]:
    """Round a layer and correct the mean error through its bias, in the float and the QDQ program."""
    bias = work.biases[layer.name]
    w_GOK = units.reshape(*units.shape[:2], -1).astype(np.float64)
    rounded = round_weights(w_GOK, fit, held_out, highest=weight_levels(), centred=bias is not None, steps=steps)
    integers, scales = rounded.reshape(units.shape), _scales(layer, work.stored[layer.name])
    layer.write((integers * scales).astype(np.float32))
    if work.simulated is not None:
        set_integers(work.simulated, layer.name, layer.restore(integers).astype(np.int8))
    if bias is not None:
        shift = fit.shift(rounded.astype(np.float64)) * scales[:, :, 0, 0]
        new = (bias + shift.reshape(-1)).astype(np.float32)
        set_bias(work.result, layer.node, new)
        if work.simulated is not None:
            set_bias(work.simulated, nodes_by_name(work.simulated)[layer.name], new)
    return integers


def _restore_moved(
    quantized: ModelProto,
    layers: Sequence[LayerWeight],
    integers: Mapping[str, NDArray[np.int32]],
    floats: Mapping[str, LayerWeight],
) -> list[str]:
    """Restore layers' float weights where the writer stores other integers, because it moved their scale."""
    stored = stored_weights(quantized)
    moved = []
    for layer in layers:
        if not np.array_equal(layer.arrange(stored[layer.name].integers), integers[layer.name]):
            layer.write(floats[layer.name].read())
            moved.append(layer.name)
    return moved


def _patch_size(layer: LayerWeight) -> int:
    _, _, inputs, taps = layer.read().shape
    return int(inputs * taps)


def _scales(layer: LayerWeight, stored: StoredWeight) -> NDArray[np.float32]:
    """Return a layer's scales as (G, O, 1, 1): one per output channel, or the same for all."""
    arranged = layer.arrange(np.broadcast_to(stored.scales, stored.integers.shape))
    return np.ascontiguousarray(arranged[:, :, :1, :1])
