"""Removal of channels from a module, one group at a time, each verified by running the module.

After a removal the module must give exactly what it gives when every layer that reads the channels ignores them. This
detects a wrong mapping between layers even where every shape fits: the module with zeros in the columns that read the
channels is compared with the smaller one. A group that fails is restored and reported with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.reports import Change, Skip
from omgoptim.techniques.probe import DoesNotRun, Probe, relative_difference, tolerance_of
from omgoptim.techniques.prune._channels.groups import (
    Group,
    Groups,
    Place,
    cut,
    narrowed,
    skips_of_kept,
    width_of,
    without_reads,
)
from omgoptim.techniques.registry import ModuleRun, Outcome, Refusal

Key = tuple[str, str]
"""Path and side of a layer, or a parameter."""

MODEL_OUTPUTS = Refusal("its channels are outputs of the model", "model_output")
DOES_NOT_RUN = "the model does not run with fewer channels"
NOT_NEEDED = Refusal("no channel was removed: the target does not need it, or round_to keeps all of them", "no_benefit")
SIZES_FIX = "compute sizes in forward from the tensors (x.flatten(1), x.shape) instead of fixed numbers"


def remove(module: nn.Module, groups: Groups, keep: Mapping[str, Tensor], run: ModuleRun) -> Outcome:
    """Remove from a module all channels but those to keep.

    Args:
        module: changed in place.
        groups: as `find_groups` found them in this module.
        keep: name of a group to the root's channels (k,) that stay; a group that is not named stays whole.
        run: how the module is called; removals are proven on its samples.

    Returns:
        Every layer that got narrower; and every layer whose own channels stay, also one that reads fewer, and why.

    Raises:
        TechniqueError: nothing could be removed.
    """
    return remove_with_positions(module, groups, keep, run)[0]


def remove_with_positions(
    module: nn.Module, groups: Groups, keep: Mapping[str, Tensor], run: ModuleRun
) -> tuple[Outcome, dict[Key, Tensor]]:
    """Do what `remove` does; return the outcome, and the positions left of each cut side, counted as before."""
    removal = Removal(module, run, replace(Probe.of(run), further_calls=groups.further_calls))
    skipped: list[Skip] = []
    shrinking = [group for group in groups.groups if group.name in keep and len(keep[group.name]) < group.width]
    for index, group in enumerate(shrinking):
        run.progress(f"removing channels: {group.name}", index / len(shrinking))
        refusal = removal.attempt(group, keep[group.name])
        if refusal:
            skipped += skips_of_kept(module, group.name, group.writers, refusal)
    changed = removal.changes()
    if shrinking and not changed:
        raise TechniqueError("no channel could be removed", skipped[0].reason, SIZES_FIX)
    names = {group.name for group in shrinking}
    for group in groups.groups:
        if group.name not in names:
            skipped += skips_of_kept(module, group.name, group.writers, NOT_NEEDED)
    return Outcome(changed, [*groups.skipped, *skipped]), removal.remaining


class Removal:
    """A module on which removals are tried, and the original channels that are left."""

    def __init__(self, module: nn.Module, run: ModuleRun, probe: Probe | None = None) -> None:
        """Take the module that changes.

        Args:
            module: changed in place.
            run: how the module is called.
            probe: what each removal is proven on; default: the first two samples.
        """
        self.module = module
        self.remaining: dict[Key, Tensor] = {}
        """The positions (k,) that are left of each side, counted as at the start."""
        self._probe = probe or Probe.of(run)
        self._full: dict[Key, int] = {}
        self._heads: list[Change] = []

    def check(self, group: Group) -> Refusal | None:
        """Return why a group cannot shrink, by removing its first unit and restoring the module; None if it can."""
        before, left = _snapshot(self.module, group), dict(self.remaining)
        heads = list(self._heads)
        refusal = self.attempt(group, group.units()[1:].flatten().sort().values)
        _restore(before)
        self.remaining, self._heads = left, heads
        return refusal

    def attempt(self, group: Group, keep: Tensor) -> Refusal | None:
        """Keep only some channels of a group; where that fails, restore the module and return why."""
        removed = torch.ones(group.width, dtype=torch.bool)
        removed[keep] = False
        reads = [place for place in group.places if place.side == "in"]
        try:
            expected = self._outputs_ignoring(reads, removed) if group.exact else self._probe.outputs(self.module)
        except DoesNotRun as error:
            return Refusal(str(error), "unsupported")
        before = _snapshot(self.module, group)
        left = dict(self.remaining)
        try:
            self._cut(group, removed)
            refusal = _refusal_of(self._probe.outputs(self.module), expected, group)
        except DoesNotRun as error:
            refusal = Refusal(f"{DOES_NOT_RUN}: {error}", "forward_fails")
        except ValueError as error:
            refusal = Refusal(str(error), "unsupported")
        if refusal:
            _restore(before)
            self.remaining = left
        elif group.kind == "heads":
            left_over = group.heads * len(keep) // group.width
            self._heads.append(Change(path=group.name, what="heads", before=str(group.heads), after=str(left_over)))
        return refusal

    def changes(self) -> list[Change]:
        """Return every side of every layer that shrank, in the module's order."""
        order = {path: index for index, (path, _) in enumerate(self.module.named_modules(remove_duplicate=False))}
        sides = [
            Change(
                path=path,
                what="input channels" if side == "in" else "channels",
                before=str(self._full[path, side]),
                after=str(len(left)),
                indirect=side == "in",
            )
            for (path, side), left in self.remaining.items()
            if len(left) < self._full[path, side]
        ]
        return sorted([*self._heads, *sides], key=lambda change: (order.get(change.path, -1), change.what))

    def _positions(self, place: Place, removed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the present positions of the removed and the kept channels at a place."""
        key = (place.path, place.side)
        if key not in self.remaining:
            size = _size(self.module, place)
            self.remaining[key], self._full[key] = torch.arange(size), size
        leaving = torch.isin(self.remaining[key], place.positions[removed[place.roots]])
        return leaving.nonzero().flatten(), (~leaving).nonzero().flatten()

    def _outputs_ignoring(self, reads: list[Place], removed: Tensor) -> list[Tensor]:
        """Return the module's outputs when its layers ignore the removed channels."""
        weights: list[tuple[Any, Tensor]] = []
        try:
            for place in reads:
                layer: Any = self.module.get_submodule(place.path)
                weights.append((layer.weight, layer.weight.data))
                layer.weight.data = without_reads(layer, self._positions(place, removed)[0])
            return self._probe.outputs(self.module)
        finally:
            for weight, data in reversed(weights):
                weight.data = data

    def _cut(self, group: Group, removed: Tensor) -> None:
        kept_share = 1 - int(removed.sum()) / group.width
        for place in group.places:
            leaving, keep = self._positions(place, removed)
            key = (place.path, place.side)
            if not len(keep):
                raise ValueError(f"{place.path} would have no channels left")
            if place.axis is not None:
                _replace(self.module, place, keep)
            else:
                layer = self.module.get_submodule(place.path)
                norm_groups = None
                if group.blocked and isinstance(layer, nn.GroupNorm):  # whole groups of it
                    norm_groups = round(layer.num_groups * kept_share)
                cut(layer, place.side, keep, norm_groups)
            self.remaining[key] = self.remaining[key][keep] if len(leaving) else self.remaining[key]
        for count in group.counts:
            setattr(self.module.get_submodule(count.path), count.name, round(count.value * kept_share))


def _refusal_of(outputs: list[Tensor], expected: list[Tensor], group: Group) -> Refusal | None:
    try:
        error = relative_difference(outputs, expected)
    except ValueError:
        return MODEL_OUTPUTS
    if group.exact and error > tolerance_of(expected):
        return Refusal(
            "removing channels changes the remaining ones: an operation in between mixes channels "
            "(a normalization or softmax over them, or a split that torch-pruning does not trace)",
            "unsupported",
        )
    return None


def _size(module: nn.Module, place: Place) -> int:
    if place.axis is not None:
        return module.get_parameter(place.path).shape[place.axis]
    width = width_of(module.get_submodule(place.path), place.side)
    assert width is not None  # groups hold no other places
    return width


def _replace(module: nn.Module, place: Place, keep: Tensor) -> None:
    """Replace a standalone parameter by a narrower one."""
    assert place.axis is not None
    path, _, name = place.path.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, name, narrowed(getattr(owner, name), place.axis, keep))


Snapshot = list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]]


def _snapshot(module: nn.Module, group: Group) -> Snapshot:
    """Save the tensors of a group's layers by name; cutting replaces tensors and never writes to them."""
    paths = {place.path.rpartition(".")[0] if place.axis is not None else place.path for place in group.places}
    layers = [module.get_submodule(path) for path in sorted(paths | {count.path for count in group.counts})]
    return [(layer, dict(vars(layer)), dict(layer._parameters), dict(layer._buffers)) for layer in layers]


def _restore(before: Snapshot) -> None:
    for layer, attributes, parameters, buffers in before:
        layer.__dict__.update(attributes)
        layer._parameters.clear()
        layer._parameters.update(parameters)
        layer._buffers.clear()
        layer._buffers.update(buffers)
