"""Reading weights: .safetensors, and .pt/.pth state dicts without running anything that a pickle could hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import ModelError
from omgoptim.models._checkpoint.key_matching import WeightSet, match_keys


def load_checkpoint(module: nn.Module, path: Path, weights: WeightSet = "auto") -> list[str]:
    """Load the weights in `path` into `module`: every entry of its state dict, or none.

    Args:
        module: changed in place.
        path: `.safetensors`, or a file of tensors that `torch.load(weights_only=True)` reads.
        weights: ema, plain, or auto: averaged weights (EMA) if the file has any.

    Returns:
        Notes on prefixes, casts and ignored entries.

    Raises:
        ModelError: the file cannot be read safely, does not fit (with the keys that do not), or is ambiguous.
    """
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    try:
        found = match_keys(read_tensors(path), own, weights)
    except ModelError as error:
        what = error.what.replace("the checkpoint", f"checkpoint {path.name}", 1)
        raise ModelError(what, error.why, error.fix) from error
    module.load_state_dict(found.state, strict=False)  # complete; only a module's own extra state may be missing
    return [f"checkpoint {path.name}: {note}" for note in found.notes]


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Whatever mapping the file holds.

    Raises:
        ModelError: an unknown ending, a damaged file, or a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: Mapping[str, Any] = load_file(path)
            return tensors
        except SafetensorError as error:
            raise ModelError(f"checkpoint {path.name} cannot be read", str(error)) from error
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ModelError(f"checkpoint {path.name} is of no known kind", "known: .safetensors, .pt, .pth, .bin, .ckpt")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # what torch says of bytes that are none of its pickles
            raise _unreadable(path, "torch.save did not write it") from error
        raise ModelError(
            f"checkpoint {path.name} holds more than tensors, so opening it would run code",
            "it is a pickled module, or carries pickled objects beside its weights",
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt'), and name the class as the model",
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError) as error:
        lines = str(error).splitlines()
        if lines and "TorchScript" in lines[0]:
            raise _unreadable(path, "it is a TorchScript archive, not a state dict") from error
        raise _unreadable(path, lines[0] if lines else "it is empty or cut off") from error
    if not isinstance(loaded, Mapping):
        raise ModelError(f"checkpoint {path.name} holds a {type(loaded).__name__}", "a state dict was expected")
    return loaded


def _unreadable(path: Path, why: str) -> ModelError:
    return ModelError(
        f"checkpoint {path.name} cannot be read", why, "save it again: torch.save(model.state_dict(), 'weights.pt')"
    )
