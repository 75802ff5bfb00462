"""Selection of layers by globs, and repeated layers: detection by running the model, and removal (depth reduction).

A selection stays the same while layers are removed and renumbered. A unit is what a stack repeats: one child of a
ModuleList or Sequential, a few neighbours (convolution, normalization, ReLU), or one child each of several lists that
the model's code runs side by side. Units repeat where their classes and the shapes of their tensors are equal and the
output has the input's shape, so that the model runs without some of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from omgoptim.models.child_removal import keep_children
from omgoptim.models.forward import attached
from omgoptim.models.globs import is_selected, refuse_unknown
from omgoptim.reports import Change
from omgoptim.requests.distill import Auto, Derived
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.registry import ModuleRun

MAX_UNIT_LENGTH = 6
"""Maximum neighbouring modules in one repeated unit. Chosen: conv, norm, activation, twice; longer units cost time."""


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """Layers of a module that `targets` and `ignore` select."""

    targets: list[str]
    """Globs or paths; empty for everything."""
    ignore: list[str]
    nothing: bool = False
    """True once everything that `targets` named was removed: empty targets would mean everything."""

    @staticmethod
    def of(module: nn.Module, params: Derived | Auto) -> LayerSelection:
        """Build the selection of a request's params.

        Raises:
            TechniqueError: a glob names no layer.
        """
        refuse_unknown((*params.targets, *params.ignore), [path for path, _ in module.named_modules() if path])
        return LayerSelection(list(params.targets), list(params.ignore))

    def includes(self, path: str) -> bool:
        """Return whether the layer at `path` may change."""
        return not self.nothing and is_selected([path], self.targets, self.ignore)

    def after(self, before: dict[int, list[str]], module: nn.Module) -> LayerSelection:
        """Return the same selection by the present paths.

        Args:
            before: id of a module to its paths when this was made, as `paths_of` gives them.
            module: the model after some of its layers went.
        """
        paths_now = paths_of(module)

        def follow(globs: list[str]) -> list[str]:
            return [
                path
                for layer, paths in paths_now.items()
                if layer in before and any(is_selected([old], globs, []) for old in before[layer])
                for path in paths
                if path
            ]

        targets = follow(self.targets) if self.targets else []
        ignore = follow(self.ignore) if self.ignore else []
        return LayerSelection(targets, ignore, nothing=bool(self.targets) and not targets)


def paths_of(module: nn.Module) -> dict[int, list[str]]:
    """Return the paths of every module by id; several where it is shared."""
    paths: dict[int, list[str]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(layer), []).append(path)
    return paths


@dataclass(frozen=True, slots=True)
class Stack:
    """Repeated units that may be removed."""

    paths: tuple[str, ...]
    """The containers: one, or several that run side by side and lose the same children."""
    units: tuple[tuple[int, ...], ...]
    """Children of each unit, numbered in the container."""

    def spread(self, keep: int) -> list[int]:
        """Return which units stay: `keep` of them, evenly spread, with the first and the last."""
        last = len(self.units) - 1
        if keep == 1:
            return [0]
        return [math.floor(index * last / (keep - 1) + 0.5) for index in range(keep)]


def find_stacks(module: nn.Module, selection: LayerSelection, run: ModuleRun) -> list[Stack]:
    """Find every stack of two or more repeated units, the outermost of nested ones.

    Raises:
        DoesNotRun: the model raises on two samples.
    """
    containers = {
        path: [child for child in layer._modules.values() if child is not None]
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.ModuleList, nn.Sequential)) and _has_layers(layer)
    }
    calls = _calls(module, containers, run)
    found: list[Stack] = []
    taken: list[str] = []
    for bundle in _bundles(module, containers, calls):
        if any(path == other or path.startswith(f"{other}.") for path in bundle for other in taken):
            continue
        places = zip(*(containers[path] for path in bundle), strict=True)
        rows = [_Row.of(children, calls) for children in places]
        for units in _repeats(rows):
            free = tuple(
                unit for unit in units if all(selection.includes(path) for path in _paths(module, bundle, unit))
            )
            if len(free) > 1:
                found.append(Stack(bundle, free))
                taken += [path for unit in units for path in _paths(module, bundle, unit)]
    return found


def drop_layers(module: nn.Module, stacks: Sequence[Stack], keep: Mapping[Stack, int]) -> list[Change]:
    """Remove units from each stack, in place.

    Args:
        module: changed in place.
        stacks: as `find_stacks` found them in this module.
        keep: stack to the units that stay, at least 1.

    Returns:
        The containers that got shorter, with the children that stayed as they were numbered before.
    """
    removed: dict[str, set[int]] = {}
    for stack in stacks:
        kept = set(stack.spread(keep[stack]))
        children = {child for index, unit in enumerate(stack.units) if index not in kept for child in unit}
        for path in stack.paths:
            removed.setdefault(path, set()).update(children)
    changes = []
    for path in sorted(removed, key=_depth, reverse=True):  # inner ones first: their paths are still right
        before = len(module.get_submodule(path))  # type: ignore[arg-type]
        kept_children = [index for index in range(before) if index not in removed[path]]
        if len(kept_children) < before:
            keep_children(module, path, kept_children)
            after = f"{len(kept_children)}: {', '.join(map(str, kept_children))}"
            changes.append(Change(path=path, what="layers", before=str(before), after=after))
    return sorted(changes, key=lambda change: change.path)


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


@dataclass(slots=True)
class _Call:
    """The first call of a layer."""

    order: int
    input_shape: torch.Size | None
    """Shape of its first input tensor."""
    output_shape: torch.Size | None


@dataclass(frozen=True, slots=True)
class _Row:
    """Children at one index of a container, or of several side by side."""

    kind: tuple[Any, ...] | None
    """A signature that is equal for repeated units; None for children that the forward does not call."""
    has_weights: bool
    input_shape: torch.Size | None
    output_shape: torch.Size | None

    @staticmethod
    def of(children: Sequence[nn.Module], calls: Mapping[int, _Call]) -> _Row:
        called = sorted((calls[id(child)] for child in children if id(child) in calls), key=lambda call: call.order)
        weights = any(_has_parameters(child) for child in children)
        if len(called) < len(children):
            return _Row(None, weights, None, None)
        return _Row(tuple(_kind(child) for child in children), weights, called[0].input_shape, called[-1].output_shape)


def _has_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _has_layers(container: nn.Module) -> bool:
    """Return whether it holds two or more children, none with shared weights."""
    weighted = [id(child) for child in container._modules.values() if child is not None and _has_parameters(child)]
    return len(container._modules) > 1 and len(set(weighted)) == len(weighted)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return (type(layer), tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors))


def _calls(module: nn.Module, containers: Mapping[str, list[nn.Module]], run: ModuleRun) -> dict[int, _Call]:
    """Return the first call of every child of a container by its id."""
    calls: dict[int, _Call] = {}

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(id(layer), _Call(len(calls), _shape((args, kwargs)), None))

    def leave(layer: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        call = calls[id(layer)]
        call.output_shape = call.output_shape or _shape(output)

    children = {id(child): child for each in containers.values() for child in each}
    hooks = [child.register_forward_pre_hook(enter, with_kwargs=True) for child in children.values()]
    hooks += [child.register_forward_hook(leave, with_kwargs=True) for child in children.values()]
    with attached(hooks):
        Probe.of(run).outputs(module)
    return calls


def _shape(values: Any) -> torch.Size | None:
    return next((leaf.shape for leaf in tree_leaves(values) if isinstance(leaf, Tensor)), None)


def _bundles(
    module: nn.Module, containers: Mapping[str, list[nn.Module]], calls: Mapping[int, _Call]
) -> Iterator[tuple[str, ...]]:
    """Yield containers, outer ones first; lists of one module that run side by side together."""
    done: set[str] = set()
    for path, children in containers.items():
        if path in done:
            continue
        bundle = [path]
        for other, other_children in containers.items():
            siblings = other.rpartition(".")[0] == path.rpartition(".")[0] and other != path
            lists = all(isinstance(module.get_submodule(each), nn.ModuleList) for each in (path, other))
            if (
                siblings
                and lists
                and len(other_children) == len(children)
                and _alternate(children, other_children, calls)
            ):
                bundle.append(other)
        done.update(bundle)
        yield tuple(bundle)


def _alternate(first: Sequence[nn.Module], second: Sequence[nn.Module], calls: Mapping[int, _Call]) -> bool:
    """Return whether the children of two lists are called index by index."""
    if any(id(child) not in calls for child in (*first, *second)):
        return False
    places = [sorted(calls[id(child)].order for child in pair) for pair in zip(first, second, strict=True)]
    return all(before[-1] < after[0] for before, after in itertools.pairwise(places))


def _paths(module: nn.Module, bundle: Sequence[str], unit: Sequence[int]) -> list[str]:
    """Return the paths of a unit's children."""
    paths = []
    for path in bundle:
        names = list(module.get_submodule(path)._modules)
        paths += [f"{path}.{names[index]}" if path else names[index] for index in unit]
    return paths


def _repeats(rows: Sequence[_Row]) -> Iterator[list[tuple[int, ...]]]:
    """Yield runs of units, the longest at each start, without overlap."""
    start = 0
    while start < len(rows):
        runs = [(_count_repeats(rows, start, length), length) for length in range(1, MAX_UNIT_LENGTH + 1)]
        count, length = max(runs, key=lambda run: (run[0] * run[1] if run[0] > 1 else 0, -run[1]))
        if count > 1:
            yield [tuple(range(start + unit * length, start + (unit + 1) * length)) for unit in range(count)]
            start += count * length
        else:
            start += 1


def _count_repeats(rows: Sequence[_Row], start: int, length: int) -> int:
    """Return how often the unit of `length` children at `start` repeats in a row with unchanged shapes."""
    first = [row.kind for row in rows[start : start + length]]
    count = 0
    while start + (count + 1) * length <= len(rows):
        unit = rows[start + count * length : start + (count + 1) * length]
        fits = [row.kind for row in unit] == first and None not in first and any(row.has_weights for row in unit)
        if not fits or unit[0].input_shape is None or unit[0].input_shape != unit[-1].output_shape:
            break
        count += 1
    return count
