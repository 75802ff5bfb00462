"""Size of a model: parameters in memory, files on disk. Torch only for modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def count_params(module: nn.Module) -> tuple[int, int]:
    """Count the parameters and the non-zero ones; a weight that several layers share counts once."""
    distinct = {_identity(parameter): parameter for parameter in module.parameters()}.values()
    return sum(p.numel() for p in distinct), sum(int((p.detach() != 0).sum()) for p in distinct)


def stored_precision(module: nn.Module) -> tuple[str, dict[str, int]]:
    """Return the floating dtype of most of a module's bytes, and the bytes of each; float32 without weights."""
    weights = {_identity(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
    stored: dict[str, int] = {}
    for tensor in weights:
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            stored[name] = stored.get(name, 0) + tensor.numel() * tensor.element_size()
    return max(stored, key=lambda name: stored[name], default="float32"), stored


def _identity(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return address, shape and stride of a tensor; the object's id if it has no memory (empty or meta)."""
    address = parameter.data_ptr()
    return (address, *parameter.shape, *parameter.stride()) if address else (id(parameter),)
