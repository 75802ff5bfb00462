"""Comparison of the memory that work needs with the memory that is available, before the work starts."""

from __future__ import annotations

from pathlib import Path

import psutil
from torch import nn

from omgoptim.errors import ModelError, OmgoptimError

FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".pt2", ".onnx")
"""Suffixes of weight files."""

TRAINING_COPIES = 5
"""Copies of a trained weight in memory: itself, its gradient, Adam's two moments, and the best so far."""


def refuse_beyond_memory(
    needed_bytes: int, what: str, available_bytes: int | None = None, kind: type[OmgoptimError] = ModelError
) -> None:
    """Raise if something does not fit into memory.

    Args:
        needed_bytes: estimate of what it takes.
        what: the action, for the error: `loading weights.pt`.
        available_bytes: default: the machine's free memory.
        kind: of the error.

    Raises:
        OmgoptimError: it needs more than is available.
    """
    available = psutil.virtual_memory().available if available_bytes is None else available_bytes
    if needed_bytes <= available:
        return
    smaller = "model" if kind is ModelError else "file"
    raise kind(
        f"{what} does not fit into memory",
        f"it needs at least about {needed_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free",
        f"free some memory, use a machine with more, or start from a smaller {smaller}",
    )


def training_bytes(module: nn.Module) -> int:
    """Return the least memory that training a module takes; activations are not counted."""
    return TRAINING_COPIES * sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def weight_bytes(path: Path) -> int:
    """Return the bytes of the weights in a file or folder: the least memory that reading them takes.

    A folder may hold the same weights in several formats; the largest of them counts.
    """
    if path.is_file():
        return path.stat().st_size
    by_format = {ending: sum(file.stat().st_size for file in path.glob(f"*{ending}")) for ending in FORMATS}
    return max(by_format.values())
