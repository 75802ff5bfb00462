"""Size of a model: parameters in memory, files on disk. Torch only for modules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from omgoptim.errors import ArtifactError

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


def folder_size(path: Path) -> int:
    """Return the bytes of all files under a folder, or of one file.

    Raises:
        ArtifactError: nothing is there.
    """
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        raise ArtifactError(f"'{path}' is neither a folder nor a file", "its size cannot be measured")
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def file_sizes(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Map name to bytes for files of a folder, in the order of `names`.

    Raises:
        ArtifactError: one of them is not there.
    """
    sizes = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"'{name}' is missing from '{path}'", "the folder is not a whole artifact")
        sizes[name] = file.stat().st_size
    return sizes
