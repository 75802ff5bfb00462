"""Structural difference between a module as its code builds it and as it is saved, as plain data.

Shapes alone do not bring a pruned module back: a depthwise convolution needs its `groups`, a LayerNorm its
`normalized_shape`, an attention block its `num_heads`. So every numeric attribute that differs goes along. Tensors that
several names share in the built module stay shared. Removed layers are recorded as the indices of the kept ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.blocks import BLOCKS
from omgoptim.errors import ArtifactError, TechniqueError
from omgoptim.models.child_removal import keep_children, kept_children

SAME_AS = "same_as"
"""In a block's record: the path of the block that is shared with this place."""


@dataclass(frozen=True, slots=True)
class StructuralDiff:
    """The difference between a module as its recipe builds it and as it is saved."""

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module path to the numeric attributes that changed: `{"conv1": {"out_channels": 12}}`."""
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module path to the block of `omgoptim.blocks` that replaced it: `{"kind": "LowRankLinear", …}`."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Name of a parameter or buffer to its new shape."""
    kept: dict[str, list[int]] = field(default_factory=dict)
    """Path of a ModuleList or Sequential to the children that it kept, outer ones first; all other paths here count
    the layers as they are numbered afterwards."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as a copy."""
        plain = {"attributes": self.attributes, "blocks": self.blocks, "shapes": self.shapes, "kept": self.kept}
        return copy.deepcopy(plain)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> StructuralDiff:
        """Create the difference from the result of `to_json`, `kept` being optional in older artifacts.

        Raises:
            ArtifactError: it is something else.
        """
        if not isinstance(record, Mapping) or set(record) | {"kept"} != {
            "attributes",
            "blocks",
            "shapes",
            "kept",
        }:
            raise _damaged("its keys must be attributes, blocks, shapes and kept")
        if not all(isinstance(part, Mapping) for part in record.values()):
            raise _damaged("attributes, blocks, shapes and kept must be objects")
        for path, values in record["attributes"].items():
            if not isinstance(values, Mapping) or not all(_is_number_or_numbers(value) for value in values.values()):
                raise _damaged(f"the attributes of '{path}' are not all numbers")
        for path, block in record["blocks"].items():
            has_kind = isinstance(block, Mapping) and (SAME_AS in block or "kind" in block)
            if not has_kind or not isinstance(block.get(SAME_AS, block.get("kind")), str):
                raise _damaged(f"the block at '{path}' has no kind")
        for name, shape in record["shapes"].items():
            if not _are_counts(shape):
                raise _damaged(f"the shape of '{name}' is not a list of sizes")
        for path, indices in record.get("kept", {}).items():
            if not _are_counts(indices):
                raise _damaged(f"the kept layers of '{path}' are not a list of numbers")
        return StructuralDiff(
            {path: dict(values) for path, values in record["attributes"].items()},
            {path: dict(block) for path, block in record["blocks"].items()},
            {name: list(shape) for name, shape in record["shapes"].items()},
            {path: list(indices) for path, indices in record.get("kept", {}).items()},
        )


def compute_diff(fresh: nn.Module, changed: nn.Module) -> StructuralDiff | None:
    """Compute the difference from `fresh`, as its code builds it, to `changed`; None if the structure is the same.

    Neither is touched. What is not recorded: weights, which are saved beside, and what is neither a number nor a block.

    Raises:
        TechniqueError: they differ in a way that cannot be recorded: a layer that only one of them has or of another
            class, a tie that was added or removed, a non-persistent buffer.
    """
    try:
        fresh, kept = kept_children(fresh, changed)
    except KeyError as error:
        raise _not_recordable(error.args[0], "layers were removed that the built module does not have") from error
    before, after = _paths(fresh), _paths(changed)
    blocks, replaced = _blocks(before, after)
    reference = {path: layer for path, layer in before.items() if not _below(path, blocks)}
    for path, block in replaced.items():
        reference.update(block.named_modules(prefix=path, remove_duplicate=False))
    for path in sorted(reference.keys() ^ after.keys()):
        whose = "was added" if path in after else "is gone"
        raise _not_recordable(path, f"the layer {whose}; only changed shapes and blocks of omgoptim can be saved")
    for path, layer in reference.items():
        if type(layer).__qualname__ != type(after[path]).__qualname__:
            kinds = f"{type(layer).__name__} became {type(after[path]).__name__}"
            raise _not_recordable(path, f"{kinds}, which is not a block of omgoptim.blocks")
    _refuse_changed_ties(fresh, changed, blocks)
    attributes = {path: found for path in reference if (found := _changed_numbers(reference[path], after[path]))}
    shapes: dict[str, list[int]] = {}
    for path, layer in reference.items():
        shapes |= _changed_shapes(path, layer, after[path])
    if not (attributes or blocks or shapes or kept):
        return None
    return StructuralDiff(attributes, blocks, shapes, kept)


def apply_diff(module: nn.Module, diff: StructuralDiff) -> None:
    """Apply the difference to a freshly built module; its weights are loaded afterwards.

    Every tensor of another shape is a new, uninitialized one, the same for all names that shared the old one.

    Raises:
        ArtifactError: the difference was recorded on another module.
    """
    for path, indices in diff.kept.items():
        try:
            keep_children(module, path, indices)
        except (AttributeError, ValueError) as error:
            raise _other_module(f"layers {indices} of '{path}' do not exist: {error}") from error
    for path, block in diff.blocks.items():
        _put_block(module, path, block)
    for path, values in diff.attributes.items():
        layer = _layer(module, path)
        for name, value in values.items():
            numbers = list if isinstance(getattr(layer, name, None), list) else tuple
            setattr(layer, name, numbers(value) if isinstance(value, (list, tuple)) else value)
    names: dict[int, list[str]] = {}
    tensors = dict(_tensors(module))
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    done: set[str] = set()
    for name, shape in diff.shapes.items():
        if name in done:
            continue
        old = tensors.get(name)
        aliases = [name] if old is None else names[id(old)]
        if any(diff.shapes.get(alias, shape) != shape for alias in aliases):
            raise _damaged(f"'{name}' is tied to {', '.join(aliases)}, but their shapes differ")
        done.update(aliases)
        new = _resized(module, name, old, shape)
        for alias in aliases:
            _put_tensor(module, alias, new)
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):  # keeps a list of its own beside its parameters
            layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]


# Recording


def _paths(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_modules(remove_duplicate=False))


def _below(path: str, paths: Mapping[str, Any]) -> bool:
    """Return whether `path` is one of `paths` or lies under one."""
    return any(path == other or path.startswith(f"{other}.") for other in paths)


def _blocks(
    before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Any]], dict[str, nn.Module]]:
    """Find the outermost replaced blocks: as data, and as built from their configuration."""
    records: dict[str, dict[str, Any]] = {}
    built: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    for path, layer in after.items():
        kind = type(layer).__name__
        is_block = BLOCKS.get(kind) is type(layer)
        if not is_block or path not in before or _below(path, records) or type(before[path]) is type(layer):
            continue
        if not path:
            raise _not_recordable(path, f"the model itself became a {kind}")
        if id(layer) in first:
            records[path], built[path] = {SAME_AS: first[id(layer)]}, built[first[id(layer)]]
            continue
        first[id(layer)] = path
        config: dict[str, Any] = layer.config()  # type: ignore[operator]
        records[path], built[path] = {"kind": kind, **config}, _built(kind, config)
    return records, built


def _changed_numbers(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    found = {}
    attributes = vars(before)
    for name, value in vars(after).items():
        if name.startswith("_") or name == "training" or not _is_number_or_numbers(value):
            continue
        was = attributes.get(name)
        same = _is_number_or_numbers(was) and (was == value or was != was)  # a NaN stays what it is
        if not same:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _is_number_or_numbers(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, (tuple, list)) and all(isinstance(item, (int, float)) for item in value)
    )


def _are_counts(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(item) is int and item >= 0 for item in value)


def _changed_shapes(path: str, before: nn.Module, after: nn.Module) -> dict[str, list[int]]:
    """Return the names, from the root, of the layer's own tensors whose shapes differ; a bias may be new."""
    shapes = {}
    for kind in ("_parameters", "_buffers"):
        old, new = getattr(before, kind), getattr(after, kind)
        for name in {**old, **new}:
            full = f"{path}.{name}" if path else name
            was, now = old.get(name), new.get(name)
            if name not in old or (was is not None and now is None):
                raise _not_recordable(full, "the tensor was added" if name not in old else "the tensor was removed")
            if now is None or (was is not None and was.shape == now.shape):
                continue
            if name in after._non_persistent_buffers_set:
                raise _not_recordable(full, "a buffer with persistent=False, which is not saved, changed its shape")
            shapes[full] = list(now.shape)
    return shapes


def _refuse_changed_ties(fresh: nn.Module, changed: nn.Module, blocks: Mapping[str, Any]) -> None:
    def ties(module: nn.Module) -> dict[str, str]:
        """Map the name of every tensor to the first name of the same tensor."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(t), name) for name, t in _tensors(module) if not _below(name, blocks)}

    before, after = ties(fresh), ties(changed)
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            cut = before[name] != name
            what = f"was tied to {before[name]}" if cut else f"is now tied to {after[name]}"
            raise _not_recordable(name, f"it {what}; tied weights must stay as in the model's code")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Map every name of every parameter and buffer to its tensor."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _built(kind: str, config: dict[str, Any]) -> nn.Module:
    block: nn.Module = BLOCKS[kind].from_config(config)  # type: ignore[attr-defined]
    return block


# Applying


def _layer(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise _other_module(f"it has no layer '{path}'") from error


def _put_block(module: nn.Module, path: str, record: Mapping[str, Any]) -> None:
    replaced = _layer(module, path)
    parent, _, name = path.rpartition(".")
    if SAME_AS in record:
        block = _layer(module, record[SAME_AS])
    else:
        kind = record["kind"]
        if kind not in BLOCKS:
            raise ArtifactError(
                f"the artifact has a block of unknown kind '{kind}' at '{path}'",
                f"this version of omgoptim has {', '.join(sorted(BLOCKS))}",
                "open it with the version of omgoptim that wrote it, or a later one",
            )
        try:
            block = _built(kind, {key: value for key, value in record.items() if key != "kind"})
        except (TypeError, ValueError, KeyError) as error:
            raise _damaged(f"building block {kind} for '{path}' failed: {error}") from error
        like = next((p for p in replaced.parameters() if p.is_floating_point()), None)
        block = block if like is None else block.to(device=like.device, dtype=like.dtype)
    _layer(module, parent)._modules[name] = block.train(replaced.training)


def _resized(module: nn.Module, name: str, old: Tensor | None, shape: list[int]) -> Tensor:
    if old is not None:
        empty = torch.empty(shape, dtype=old.dtype, device=old.device)
        return nn.Parameter(empty, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else empty
    path, _, local = name.rpartition(".")
    owner = _layer(module, path)
    if local not in owner._parameters:
        raise _other_module(f"it has no tensor '{name}'")
    like = next((p for p in owner._parameters.values() if p is not None), torch.empty(0))  # a layer got a bias
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))


def _put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, local = name.rpartition(".")
    owner = _layer(module, path)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[local] = tensor
    else:
        owner._buffers[local] = tensor


# Errors


def _not_recordable(path: str, why: str) -> TechniqueError:
    return TechniqueError(
        "the changed model cannot be saved as a recipe and weights", f"'{path}': {why}", f"add '{path}' to ignore"
    )


def _damaged(why: str) -> ArtifactError:
    return ArtifactError("the structural changes of the artifact cannot be read", why, "run the compression again")


def _other_module(why: str) -> ArtifactError:
    return ArtifactError(
        "the model's code no longer builds the model that was compressed",
        why,
        "restore the code that the model was compressed with, or run the compression again",
    )
