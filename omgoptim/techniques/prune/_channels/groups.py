"""Groups: channels that can only be removed together, across all layers that write, pass on and read them.

A group is described by the channels of its root, the first layer that writes them, and by places: one side of one layer
each, with its positions and the root channel of each position. So a channel of a convolution may correspond to one
column of a later convolution, to 49 of a Linear behind a flattened 7x7 map, or to three rows of a fused qkv.

A side is "out", the channels that a layer writes, or "in", those that it reads. A layer that treats every channel by
itself (a normalization, a depthwise convolution, PReLU) has one side, "out". Positions count channels of a side from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from omgoptim.models.globs import matches
from omgoptim.reports import Skip
from omgoptim.requests.prune import Structured
from omgoptim.techniques.probe import FOLD, is_shared
from omgoptim.techniques.registry import Refusal

Side = Literal["out", "in"]

ROUND_TO, ROUND_FROM = 8, 32
"""Default rounding: widths of at least the second number are multiples of the first, the float32 numbers of an AVX2
register; in smaller groups rounding would dominate the change.
"""


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a depthwise convolution."""
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def width_of(layer: nn.Module, side: Side) -> int | None:
    """Return the channels on one side of a layer; None where it cannot be cut."""
    if isinstance(layer, _ConvNd):
        return layer.out_channels if side == "out" else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "out" else layer.in_features
    if isinstance(layer, (_BatchNorm, _InstanceNorm)):  # the latter of which a BatchNorm is by inheritance
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    return None


def channel_groups(layer: nn.Module) -> int:
    """Return the number of groups into which a layer divides both its sides."""
    if isinstance(layer, _ConvNd) and not is_depthwise(layer):
        return layer.groups
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else 1


def cut(layer: nn.Module, side: Side, keep: Tensor, norm_groups: int | None = None) -> None:
    """Keep only some channels of one side.

    Args:
        layer: any that `width_of` knows; its tensors are replaced by new ones.
        side: `in` or `out`.
        keep: positions (k,) that stay, ascending.
        norm_groups: into how many groups a GroupNorm divides what stays; by default as many as before.

    Raises:
        ValueError: a grouped convolution would keep other positions in one of its groups than in another.
    """
    count = len(keep)
    if isinstance(layer, _ConvNd):
        _cut_conv(layer, side, keep)
    elif isinstance(layer, nn.Linear):
        if side == "out":
            _keep_along(layer, keep, weight=0, bias=0)
            layer.out_features = count
        else:
            _keep_along(layer, keep, weight=1)
            layer.in_features = count
    elif isinstance(layer, (_BatchNorm, _InstanceNorm)):
        _keep_along(layer, keep, weight=0, bias=0, running_mean=0, running_var=0)
        layer.num_features = count
    elif isinstance(layer, nn.GroupNorm):
        _keep_along(layer, keep, weight=0, bias=0)
        layer.num_channels = count
        layer.num_groups = norm_groups or layer.num_groups
    elif isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        _keep_along(layer, keep, weight=0)
        layer.num_parameters = count
    elif isinstance(layer, nn.Embedding):
        _keep_along(layer, keep, weight=1)
        layer.embedding_dim = count


def _cut_conv(layer: _ConvNd, side: Side, keep: Tensor) -> None:
    groups, count = layer.groups, len(keep)
    rows, columns = (1, 0) if layer.transposed else (0, 1)  # the axis of the outputs, and that of the inputs
    if is_depthwise(layer):
        _keep_along(layer, keep, weight=0, bias=0)
        layer.in_channels = layer.out_channels = layer.groups = count
        return
    shared_axis = 1  # of a grouped convolution's weight: the same positions in every group
    axis = rows if side == "out" else columns
    total = layer.out_channels if side == "out" else layer.in_channels
    within = _within_group(keep, total, groups) if groups > 1 and axis == shared_axis else keep
    _keep_along(layer, within, weight=axis)
    if side == "out":
        _keep_along(layer, keep, bias=0)
        layer.out_channels = count
    else:
        layer.in_channels = count
    if groups > 1 and axis != shared_axis:
        _within_group(keep, total, groups)


def _within_group(keep: Tensor, total: int, groups: int) -> Tensor:
    """Return the positions that stay within one group, which must be the same in each."""
    size = total // groups
    if len(keep) % groups == 0:
        within = (keep % size).view(groups, -1)
        blocks = torch.arange(groups, device=keep.device).unsqueeze(1)
        if bool((within == within[0]).all()) and bool((keep.view(groups, -1) // size == blocks).all()):
            return within[0]
    raise ValueError(f"a convolution with {groups} groups must lose the same channels in each group")


def _keep_along(layer: nn.Module, keep: Tensor, **axes: int) -> None:
    """Replace the layer's named tensors, where present, by the kept part along an axis."""
    for name, axis in axes.items():
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            setattr(layer, name, narrowed(tensor, axis, keep))


def narrowed(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    """Return the kept part of a tensor along an axis, a parameter if it was one."""
    kept = tensor.detach().index_select(axis, keep.to(tensor.device)).clone()
    return nn.Parameter(kept, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def without_reads(layer: nn.Module, positions: Tensor) -> Tensor:
    """Return the weight of a Linear or a convolution with zeros where it reads the channels at `positions`."""
    weight: Tensor = layer.weight.detach().clone()  # type: ignore[operator]
    axis = 0 if getattr(layer, "transposed", False) else 1
    if axis == 1:
        positions = positions % weight.shape[1]  # of a grouped convolution: the same in each group
    weight.index_fill_(axis, positions.to(weight.device), 0.0)
    return weight


def as_rows(layer: nn.Module, side: Side, values: Tensor) -> Tensor:
    """Return values of the weight's shape, such as its gradient, as one row per channel of a side: (width, *).

    A grouped convolution reads channel c with the c-th column of its own group only.
    """
    groups: int = getattr(layer, "groups", 1)
    transposed: bool = getattr(layer, "transposed", False)
    if is_depthwise(layer):
        return values.flatten(1)
    if groups == 1:
        axis = int((side == "in") != transposed)
        return values.movedim(axis, 0).flatten(1)
    if (side == "out") != transposed:
        return values.flatten(1)
    grouped = values.view(groups, -1, *values.shape[1:])  # (groups, own side, other side, *kernel)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a layer, or one axis of a standalone parameter, that holds a group's channels."""

    path: str
    """Path of the layer; for a parameter its own name."""
    side: Side
    positions: Tensor
    """(n,) channels of that side."""
    roots: Tensor
    """(n,) the root's channel that each of them belongs to."""
    axis: int | None = None
    """Axis of the parameter; None for a layer."""


@dataclass(frozen=True, slots=True)
class Count:
    """An attribute of a module that depends on the width."""

    path: str
    name: str
    value: int


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that go together."""

    name: str
    """Path of the root: the first layer whose outputs shrink."""
    width: int
    """Channels that the root has now."""
    unit: int
    """Channels per unit of removal: 1, those of a head, or one of each group of a grouped convolution."""
    kind: Literal["channels", "heads"]
    places: tuple[Place, ...]
    blocked: bool = True
    """True if a unit is a block of neighbours (a head), False if it is one channel of each of `unit` equal blocks."""
    exact: bool = True
    """True if removal leaves the other channels unchanged; False where a normalization spans both."""
    heads: int = 0
    """Attention heads per unit; several with grouped-query attention."""
    counts: tuple[Count, ...] = ()

    @property
    def members(self) -> tuple[tuple[str, Side], ...]:
        """Return path and side of every layer in the group."""
        return tuple((place.path, place.side) for place in self.places)

    @property
    def writers(self) -> tuple[str, ...]:
        """Return the layers and parameters whose own channels shrink with the group."""
        return tuple(dict.fromkeys(place.path for place in self.places if place.side == "out"))

    def units(self) -> Tensor:
        """Return the root's channels of each unit, (units, unit)."""
        order = torch.arange(self.width)
        return order.view(-1, self.unit) if self.blocked else order.view(self.unit, -1).T

    def step(self, round_to: int | None) -> int:
        """Return the multiple for widths: of whole units, and of `round_to`.

        By default of 8, except where that is most of the width, and for heads.
        """
        if round_to is None:
            rounded = math.lcm(self.unit, ROUND_TO)
            worth_it = self.kind == "channels" and self.width >= ROUND_FROM and rounded * 4 <= self.width
            return rounded if worth_it else self.unit
        return math.lcm(self.unit, round_to)


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups that can shrink, and the layers that keep their width with the reasons."""

    groups: list[Group]
    skipped: list[Skip] = field(default_factory=list)
    further_calls: tuple[tuple[tuple[Tensor, ...], dict[str, Tensor]], ...] = ()
    """Arguments of forwards on single samples with other execution paths, to verify removals on too."""


def skips_of_kept(module: nn.Module, root: str, writers: Sequence[str], refusal: Refusal) -> list[Skip]:
    """Return skips for the root of a kept group and for every other convolution and Linear that writes its channels."""
    layers = dict(module.named_modules())
    others = [
        path for path in dict.fromkeys(writers) if path != root and isinstance(layers.get(path), (_ConvNd, nn.Linear))
    ]
    return [
        refusal.skip(root),
        *(Refusal(f"its channels are tied to those of {root}: {refusal.reason}", "tied").skip(path) for path in others),
    ]


def why_kept(module: nn.Module, places: Sequence[Place], owners: Mapping[int, list[tuple[int, str]]]) -> Refusal | None:
    """Return why the layers at these places keep their width; None if they can shrink.

    Args:
        module: that holds the layers.
        places: sides of layers, or parameters, that would lose channels.
        owners: as `parameter_owners` gives them.
    """
    for place in places:
        if place.axis is not None:
            tensors = [(place.path, module.get_parameter(place.path))]
        else:
            layer = module.get_submodule(place.path)
            width = width_of(layer, place.side)
            if width is None:
                return Refusal(_why_no_width(place.path, layer), "unsupported")
            if place.positions.numel() and int(place.positions.max()) >= width:
                reason = f"{place.path} reads fewer channels than reach it: an operation in between changes them"
                return Refusal(reason, "unsupported")
            if "weight" not in layer._parameters:
                return Refusal(f"the weight of {place.path} is computed {FOLD}", "unsupported")
            tensors = [(f"{place.path}.{name}", t) for name, t in layer._parameters.items() if t is not None]
        for name, tensor in tensors:
            if not tensor.requires_grad:
                return Refusal(f"{name} is frozen (requires_grad is False)", "excluded")
            if is_shared(tensor, owners):
                other_names = [other for _, other in owners[id(tensor)] if other != name]
                return Refusal(f"{name} is tied to {', '.join(other_names)}, and the tie must be kept", "tied")
    return None


def _why_no_width(path: str, layer: nn.Module) -> str:
    kind = type(layer).__name__
    if isinstance(layer, nn.LayerNorm):
        return f"{path} ({kind}) normalizes over these channels: removing some changes the others"
    return f"its channels are those of {path} ({kind}), whose width cannot change"


def exclusion(group: Group, params: Structured) -> Refusal | None:
    """Return why the request excludes a group: by `ignore`, or since `targets` names no layer that shrinks."""
    ignored = next((path for path in group.writers if any(matches(glob, path) for glob in params.ignore)), None)
    if ignored is not None:
        return Refusal(f"{ignored} is excluded by ignore", "excluded")
    if params.targets and not any(matches(glob, path) for glob in params.targets for path in group.writers):
        return Refusal("not selected by targets", "excluded")
    if group.kind == "heads" and not params.prune_heads:
        return Refusal("heads are not pruned (prune_heads is off)", "excluded")
    return None
