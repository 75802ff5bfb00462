"""Weights of a module artifact: a safetensors file, with sparse tensors as a bitmask and their nonzero values.

A packed tensor `name` becomes `name.mask`, one bit per element in row-major order (1 where the element is stored, the
first element in the highest bit of the first byte, the last byte filled up with 0), and `name.values`, the stored
elements in that order. The round trip is bit-exact: only +0.0 is omitted; -0.0 and NaN are stored.

This saves storage and transfer. Opened tensors are dense: memory and time stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omgoptim.errors import ArtifactError
from omgoptim.models.manifest import WEIGHTS, Manifest, listed_file
from omgoptim.models.recipe import RecipeRecord
from omgoptim.runtimes.torch_precision import load_state, state_of

MASK, VALUES = ".mask", ".values"
ENTRY_OVERHEAD_BYTES = 128
"""Approximate bytes of an additional tensor in a safetensors header, with its shape in the recipe."""
MIN_PACKING_GAIN = 0.02
"""Smallest fraction of the weights' bytes that packing has to save. Chosen: every reader has to unpack them."""


def distinct_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a module's tensors by name, tied weights once, and the further names of these."""
    tensors, aliases = {}, {}
    by_storage: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_of(module).items():
        storage_key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and storage_key in by_storage:
            aliases[name] = by_storage[storage_key]
        else:
            by_storage[storage_key] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def save_weights(path: Path, tensors: dict[str, Tensor], *, may_pack: bool) -> tuple[dict[str, list[int]], int]:
    """Save the weights, as bitmask and values where that is smaller.

    Returns:
        The shapes of the packed tensors, and the bytes saved.
    """
    stored, shapes = pack(tensors) if may_pack else (tensors, {})
    if dense_bytes(stored) > (1 - MIN_PACKING_GAIN) * dense_bytes(tensors):
        shapes = {}
    save_file(tensors, path)
    if not shapes:
        return {}, 0
    dense = path.stat().st_size  # of a real file: the header counts too
    save_file(stored, path)
    return shapes, dense - path.stat().st_size


def load_weights(folder: Path, manifest: Manifest, module: nn.Module, built: RecipeRecord) -> None:
    """Load an artifact's weights into the module that its recipe builds.

    Raises:
        ArtifactError: the file is damaged, or does not fit the module.
    """
    try:
        state = unpack(load_file(listed_file(folder, manifest, WEIGHTS)), built.packed)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"artifact {folder} is damaged", f"{WEIGHTS} cannot be read: {error}") from error
    try:
        load_state(module, state | {name: state[kept] for name, kept in built.aliases.items()})
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(
            f"the weights of artifact {folder} do not fit the module that {built.recipe.spec} builds now",
            str(error),
            "the model's code changed since the run: restore it, or run the compression again",
        ) from error


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Pack every float tensor that becomes smaller; leave the others unchanged.

    Args:
        tensors: any shapes and dtypes, on the CPU.

    Returns:
        The tensors to store, by name: packed tensors as `name.mask` (uint8, ceil(elements / 8)) and `name.values` (the
        tensor's dtype, one number per stored element), others unchanged. And the shape of each packed tensor.
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        name_conflict = name + MASK in tensors or name + VALUES in tensors
        if name_conflict or not tensor.is_floating_point():
            stored[name] = tensor
            continue
        flat = tensor.detach().contiguous().flatten()
        nonzero = (flat.view(torch.uint8).reshape(-1, tensor.element_size()) != 0).any(1)
        if not _pays(nonzero, tensor.element_size()):
            stored[name] = tensor
            continue
        stored[name + MASK] = torch.from_numpy(np.packbits(nonzero.numpy()))
        stored[name + VALUES] = flat[nonzero]
        shapes[name] = list(tensor.shape)
    return stored, shapes


def unpack(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Unpack the result of `pack`.

    Args:
        tensors: the stored tensors of `pack`.
        shapes: the shape of each packed tensor.

    Raises:
        ArtifactError: a packed tensor lacks a part, or its parts do not fit its shape.
    """
    dense = dict(tensors)
    for name, shape in shapes.items():
        mask, values = dense.pop(name + MASK, None), dense.pop(name + VALUES, None)
        count = math.prod(shape)
        if mask is None or values is None or len(mask) != math.ceil(count / 8):
            raise ArtifactError(f"the packed weight '{name}' is damaged", f"its parts do not match shape {shape}")
        nonzero = torch.from_numpy(np.unpackbits(mask.numpy(), count=count).astype(bool))
        if int(nonzero.sum()) != len(values):
            raise ArtifactError(
                f"the packed weight '{name}' is damaged", f"{len(values)} values for {int(nonzero.sum())} positions"
            )
        flat = torch.zeros(count, dtype=values.dtype)
        flat[nonzero] = values
        dense[name] = flat.reshape(shape)
    return dense


def _pays(nonzero: Tensor, element_size: int) -> bool:
    packed = math.ceil(nonzero.numel() / 8) + int(nonzero.sum()) * element_size
    return packed + ENTRY_OVERHEAD_BYTES < nonzero.numel() * element_size


def dense_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all elements, zeros included, without a file's header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
