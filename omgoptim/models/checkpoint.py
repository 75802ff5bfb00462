"""Reading weights: .safetensors, and .pt/.pth state dicts without running anything that a pickle could hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import ModelError, argument

NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DistributedDataParallel, torch.compile and Lightning put before every key."""


def load_checkpoint(module: nn.Module, path: Path) -> list[str]:
    """Load the weights in `path` into `module`, strictly.

    Returns:
        What was understood on the way: nesting, prefixes.

    Raises:
        ModelError: the file cannot be read safely, or does not fit (with the keys that do not).
    """
    state, notes = _unwrap(read_tensors(path), set(module.state_dict()))
    _check_fit(module, state, path)
    module.load_state_dict(state)
    return [f"checkpoint {path.name}: {note}" for note in notes]


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
            raise _unreadable(path, "it is no file that torch.save wrote") from error
        raise ModelError(
            f"checkpoint {path.name} holds more than tensors, so opening it would run code",
            "it is a pickled module, or carries pickled objects beside its weights",
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt'), and name the class as the model",
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError) as error:
        said = str(error).splitlines()
        if said and "TorchScript" in said[0]:
            raise _unreadable(path, "it is a TorchScript archive, not a state dict") from error
        raise _unreadable(path, said[0] if said else "it is empty or cut off") from error
    if not isinstance(loaded, Mapping):
        raise ModelError(f"checkpoint {path.name} holds a {type(loaded).__name__}", "a state dict was expected")
    return loaded


def _unreadable(path: Path, why: str) -> ModelError:
    return ModelError(
        f"checkpoint {path.name} cannot be read", why, "save it again: torch.save(model.state_dict(), 'weights.pt')"
    )


def _unwrap(state: Mapping[str, Any], expected: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The flat state dict inside a training checkpoint, without the prefixes that wrappers add."""
    notes = []
    while not (expected & state.keys()):
        nest = next((key for key in NESTED_UNDER if isinstance(state.get(key), Mapping)), None)
        if nest is None:
            break
        state = state[nest]
        notes.append(f"the weights stood under '{nest}'")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    while tensors and not (expected & tensors.keys()):
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        notes.append(f"the prefix '{prefix}' was dropped")
    return tensors, notes


def _check_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{label}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("shapes differ", shapes))
        if keys
    ]
    if problems:
        raise ModelError(
            f"checkpoint {path.name} does not fit the model",
            "; ".join(problems),
            f"give the model's own arguments, {argument('model_kwargs', {'width': 64})} for instance, "
            "or the checkpoint of this architecture",
        )
