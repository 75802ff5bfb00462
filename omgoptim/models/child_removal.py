"""Removal of children from a ModuleList or a Sequential, and adjustment of what counts them.

Children are renumbered 0..n-1, as the module's own code would have built a shorter stack. The indices of the kept ones
are recorded at the container, where `compute_diff` finds them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

KEPT_ATTRIBUTE = "_kept_children"
"""Attribute of a container with removed children: the original indices of the kept ones."""

COUNTS = (
    *("num_layers", "num_hidden_layers", "n_layers", "n_layer", "nlayers", "num_layer", "depth", "num_blocks"),
    *("n_blocks", "layers", "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
"""Attributes of models and configurations that hold the number of layers."""

INDICES = ("layer_idx", "layer_id", "layer_index", "block_idx", "block_index")
"""Attributes of a layer that hold its own index, counted from 0."""

SIDES = ("encoder", "decoder")
"""Parts whose counts are independent of each other."""


def keep_children(module: nn.Module, path: str, indices: Sequence[int]) -> None:
    """Remove all other children from the ModuleList or Sequential at `path`, in place.

    A Sequential whose children have names of their own keeps them. Numbers that count the layers follow: in the modules
    around it, in a `config` that one of them holds (a copy from then on, since others may hold it too), and the index
    that a layer knows of itself.

    Args:
        module: changed.
        path: of the container, which keeps at least one layer.
        indices: of the children to keep, in the present numbering, ascending.

    Raises:
        AttributeError: there is no such path.
        ValueError: it is not a container of that kind, or the indices are not ascending numbers of its children.
    """
    container = module.get_submodule(path)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"'{path}' is a {type(container).__name__}, not a ModuleList or Sequential")
    indices, before = list(indices), len(container)
    if not indices or sorted(set(indices)) != indices or indices[0] < 0 or indices[-1] >= before:
        raise ValueError(f"'{path}' has {before} layers: {indices} are not valid indices to keep")
    names, children = list(container._modules), list(container._modules.values())
    numbered = names == [str(index) for index in range(before)]
    kept = {str(new) if numbered else names[old]: children[old] for new, old in enumerate(indices)}
    container._modules.clear()
    container._modules.update(kept)
    original = vars(container).get(KEPT_ATTRIBUTE) or tuple(range(before))
    setattr(container, KEPT_ATTRIBUTE, tuple(original[index] for index in indices))
    for new, old in enumerate(indices):
        _renumber(children[old], old, new)
    for owner in _enclosing_modules(module, path):
        _update_counts(owner, path, before, len(indices))
        config = vars(owner).get("config")
        if hasattr(config, "__dict__") and not isinstance(config, (nn.Module, type)):
            _update_config(module, config, path, before, indices)


def kept_children(fresh: nn.Module, changed: nn.Module) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return the children that `changed` kept, and `fresh` with only these: a copy that shares its tensors.

    Returns:
        `fresh` itself where nothing went; and path, as in `changed`, to the children of `fresh` that stayed, outer
        containers first.

    Raises:
        KeyError: of a path where `fresh` has no such container, or lacks a child that `changed` has.
    """
    reference, found = fresh, dict[str, list[int]]()
    for path, layer in changed.named_modules():
        kept_now = vars(layer).get(KEPT_ATTRIBUTE)
        if kept_now is None:
            continue
        try:
            container = reference.get_submodule(path)
            kept_before = vars(container).get(KEPT_ATTRIBUTE) or tuple(range(len(container)))  # type: ignore[arg-type]
            indices = [kept_before.index(index) for index in kept_now]
            if len(indices) == len(kept_before):
                continue
            if reference is fresh:
                tensors = itertools.chain(fresh.parameters(), fresh.buffers())
                reference = copy.deepcopy(fresh, {id(tensor): tensor for tensor in tensors})
            keep_children(reference, path, indices)
        except (AttributeError, TypeError, ValueError) as error:
            raise KeyError(path) from error
        found[path] = indices
    return reference, found


def _enclosing_modules(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the modules around a path, the root first."""
    parts = path.split(".")
    for length in range(len(parts) if path else 0):
        yield module.get_submodule(".".join(parts[:length]))


def _counts(name: str, path: str) -> bool:
    return name in COUNTS and all(side not in name or side in path.lower() for side in SIDES)


def _update_counts(owner: Any, path: str, before: int, after: int) -> None:
    for name, value in list(vars(owner).items()):
        if type(value) is int and value == before and _counts(name, path):
            setattr(owner, name, after)


def _renumber(layer: nn.Module, old: int, new: int) -> None:
    for part in layer.modules():
        for name in INDICES:
            value = vars(part).get(name)
            if type(value) is int and value == old:
                setattr(part, name, new)


def _update_config(module: nn.Module, config: Any, path: str, before: int, kept: list[int]) -> None:
    """Adjust the number of layers in the configuration, for all parts of the module that hold it."""
    copied = copy.deepcopy(config)
    try:
        _update_counts(copied, path, before, len(kept))
        for name, value in list(vars(copied).items()):
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == before:
                setattr(copied, name, type(value)(value[index] for index in kept))
    except (AttributeError, TypeError):  # one that cannot be written to
        return
    for part in module.modules():
        if vars(part).get("config") is config:
            part.config = copied
