"""Rows that a layer's weight is multiplied with: vectors of a Linear, patches of a convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from omgoptim.models.samples import Samples, as_tensors, batch_length
from omgoptim.techniques.registry import ModuleRun

DenseLayer = nn.Linear | nn.Conv2d

MASKS = ("attention_mask", "mask")
"""Names of inputs that mark the real positions of a sequence with 1 or True, as in Hugging Face models. Other masks are
not read: torch's `key_padding_mask` marks the padding instead.
"""

MOST_PATCHES = 256
"""Maximum patches of one sample, evenly spread: neighbouring patches of an image are similar."""

BATCH = 16
"""Samples per forward: the gradients of the outputs have to fit in memory."""


def batches_of(samples: Samples, limit: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield the first `limit` samples in batches of at most `BATCH`."""
    left = limit
    for batch in samples.batches:
        size = min(left, batch_length(batch))
        for start in range(0, size, BATCH):
            yield {name: array[start : min(start + BATCH, size)] for name, array in batch.items()}
        left -= size
        if left <= 0:
            return


def call_tensors(batch: Mapping[str, np.ndarray[Any, Any]], run: ModuleRun) -> dict[str, Tensor]:
    """Return a batch as tensors on the run's device, in the signature's dtypes."""
    return {name: tensor.to(run.device) for name, tensor in as_tensors(dict(batch), run.signature.dtypes).items()}


def padding_mask(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mask (B, T), True for real positions, of a batch of padded sequences.

    None where no input of a name in `MASKS` has two dimensions and only values of 0 and 1, or where none or all of its
    positions are real.
    """
    mask = next((tensors[name] for name in MASKS if name in tensors), None)
    if mask is None or mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    real = mask != 0
    return real if bool(real.any()) and not bool(real.all()) else None


def unpadded_rows(values: Tensor, real: Tensor | None) -> Tensor:
    """Return (B, T, C) as (rows, C): the real positions where the mask (B, T) fits, else all."""
    if real is not None and values.dim() == 3 and values.shape[:2] == real.shape:
        return values[real]
    return values.reshape(-1, values.shape[-1])


def input_rows(layer: DenseLayer, values: Tensor, real: Tensor | None) -> Tensor:
    """Return the rows that the weight of each group is multiplied with, float64.

    Args:
        layer: the layer.
        values: its input, (*, in) of a Linear, (N, in, H, W) or (in, H, W) of a convolution.
        real: the batch's mask.

    Returns:
        (groups, rows, in of a group): in is in_features, or in / groups * kernel height * kernel width in the order of
        the weight. Padding of a convolution counts as zeros. At most `MOST_PATCHES` patches of a sample.
    """
    if isinstance(layer, nn.Linear):
        return unpadded_rows(values, real).double()[None]
    images = values if values.dim() == 4 else values[None]
    found = []
    for image in padded(layer, images):  # one at a time: patches take kernel height * width times an image's memory
        patches = patches_of(layer, image[None])[0]
        found.append(patches[:, spread(patches.shape[1], patches.device)].double())
    patches = torch.cat(found, dim=1)
    return patches.reshape(layer.groups, -1, patches.shape[1]).mT


def rows_of_shape(layer: DenseLayer, shape: Sequence[int]) -> int:
    """Return how many rows `input_rows` gives for an input of this shape, padding included."""
    if isinstance(layer, nn.Linear):
        return math.prod(shape[:-1])
    left, right, above, below = layer._reversed_padding_repeated_twice
    sides = [
        (size + more - dilation * (kernel - 1) - 1) // stride + 1
        for size, more, dilation, kernel, stride in zip(
            shape[-2:], (above + below, left + right), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return min(math.prod(sides), MOST_PATCHES) * (shape[0] if len(shape) == 4 else 1)


def output_rows(layer: DenseLayer, values: Tensor, real: Tensor | None) -> Tensor:
    """Return the rows of an output, or of its gradient: (groups, rows, out of a group), float64, all positions."""
    if isinstance(layer, nn.Linear):
        return unpadded_rows(values, real).double()[None]
    channels = values if values.dim() == 4 else values[None]
    flat = channels.double().movedim(1, 0).reshape(layer.groups, layer.out_channels // layer.groups, -1)
    return flat.mT


def spread(count: int, device: torch.device) -> Tensor:
    """Return at most `MOST_PATCHES` of so many positions: all, or a fixed pseudo-random choice."""
    if count <= MOST_PATCHES:
        return torch.arange(count, device=device)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(count))[:MOST_PATCHES]
    return drawn.sort().values.to(device)


def padded(layer: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """Pad an input (N, C, *size) as the layer does, to (N, C, H, W); H is 1 for a Conv1d."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    found = functional.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    return found.unsqueeze(2) if isinstance(layer, nn.Conv1d) else found


def patches_of(layer: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """Return the patches of a `padded` input: (N, groups * F, positions), F in the order of one output's weight."""
    geometry: list[Any] = [
        (1, *value) if len(value) == 1 else value for value in (layer.kernel_size, layer.dilation, layer.stride)
    ]
    kernel, dilation, stride = geometry
    return functional.unfold(images, kernel, dilation, 0, stride)
