"""Groups: channels that can only be removed together, across all layers that write, pass on and read them.

A group is described by the channels of its root, the first layer that writes them, and by places: one side of one layer
each, with its positions and the root channel of each position. So a channel of a convolution may correspond to one
column of a later convolution, to 49 of a Linear behind a flattened 7x7 map, or to three rows of a fused qkv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from omgoptim.models.globs import matches
from omgoptim.reports import Skip, SkipReason
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.layer_widths import Side, width_of

ROUND_TO, ROUND_FROM = 8, 32
"""Default rounding: widths of at least the second number are multiples of the first; in smaller groups rounding would
dominate the change.
"""


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
    """Whether a unit is a block of neighbours (a head), or one channel of each of `unit` equal blocks."""
    exact: bool = True
    """Whether removal leaves the other channels unchanged: not where a normalization spans both."""
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
class Refusal:
    """Reason for which one group keeps its width."""

    reason: str
    kind: SkipReason = "other"


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups that can shrink, and the layers that keep their width with the reasons."""

    groups: list[Group]
    skipped: list[Skip] = field(default_factory=list)
    others: tuple[tuple[tuple[Tensor, ...], dict[str, Tensor]], ...] = ()
    """Arguments of forwards on single samples with other execution paths, to verify removals on too."""


def stays(module: nn.Module, root: str, writers: Sequence[str], refusal: Refusal) -> list[Skip]:
    """Return skips for the root of a kept group and for every other convolution and Linear that writes its channels."""
    layers = dict(module.named_modules())
    others = [
        path for path in dict.fromkeys(writers) if path != root and isinstance(layers.get(path), (_ConvNd, nn.Linear))
    ]
    return [
        Skip(path=root, reason=refusal.reason, kind=refusal.kind),
        *(
            Skip(path=path, reason=f"its channels go with those of {root}: {refusal.reason}", kind="tied")
            for path in others
        ),
    ]


def owned_parameters(module: nn.Module) -> dict[int, list[tuple[int, str]]]:
    """Return the owners (layer id and name) of each parameter by its id; more than one layer is a tie."""
    owners: dict[int, list[tuple[int, str]]] = {}
    for path, layer in module.named_modules():
        for name, tensor in layer._parameters.items():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((id(layer), f"{path}.{name}" if path else name))
    return owners


def why_not(module: nn.Module, places: Sequence[Place], owners: Mapping[int, list[tuple[int, str]]]) -> str:
    """Return why the layers at these places keep their width; empty if they can shrink.

    Args:
        module: that holds the layers.
        places: sides of layers, or parameters, that would lose channels.
        owners: as `owned_parameters` gives them.
    """
    for place in places:
        if place.axis is not None:
            tensors = [(place.path, module.get_parameter(place.path))]
        else:
            layer = module.get_submodule(place.path)
            width = width_of(layer, place.side)
            if width is None:
                return _of_no_width(place.path, layer)
            if place.positions.numel() and int(place.positions.max()) >= width:
                return f"{place.path} is narrower than what reaches it: something in between changes the channels"
            if "weight" not in layer._parameters:
                return f"the weight of {place.path} is computed from others (a parametrization)"
            tensors = [(f"{place.path}.{name}", t) for name, t in layer._parameters.items() if t is not None]
        for name, tensor in tensors:
            if not tensor.requires_grad:
                return f"{name} is frozen (requires_grad is False)"
            tied = owners.get(id(tensor), [])
            if len({layer_id for layer_id, _ in tied}) > 1:
                others = [other for _, other in tied if other != name]
                return f"{name} is tied to {', '.join(others)}, and stays so"
    return ""


def _of_no_width(path: str, layer: nn.Module) -> str:
    kind = type(layer).__name__
    if isinstance(layer, nn.LayerNorm):
        return f"{path} ({kind}) normalizes over these channels: without some, the others would change"
    return f"its channels are those of {path} ({kind}), whose width stays"


def not_asked_for(places: Sequence[Place], params: Structured) -> str:
    """Return why the request excludes a group: by `ignore`, or since `targets` names no layer that shrinks."""
    written = [place.path for place in places if place.side == "out"]
    ignored = next((path for path in written if any(matches(glob, path) for glob in params.ignore)), None)
    if ignored is not None:
        return f"ignore names {ignored}"
    if params.targets and not any(matches(glob, path) for glob in params.targets for path in written):
        return "targets does not name it"
    return ""
