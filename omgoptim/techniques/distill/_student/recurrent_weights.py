"""Removal of hidden units of LSTM, GRU and RNN layers.

A layer's parameters have gates * units rows, one block of units for each gate; `weight_hh` reads the layer's own units,
`weight_ih` of the layers above the lowest those of the layer below, both directions side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.reports import Change
from omgoptim.techniques.prune._channels.layer_widths import narrowed


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that reads hidden units in some columns of its weight."""

    path: str
    columns: Tensor
    """Columns (n,) of its inputs."""
    units: Tensor
    """(n,) the unit that each of them reads, counted over all layers and directions."""


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A recurrent layer whose units can be removed."""

    path: str
    importance: Tensor
    """Importance of every unit, (layers * directions, hidden units)."""
    readers: tuple[Reader, ...]
    numbers: tuple[tuple[str, str], ...] = ()
    """Path and name of attributes that hold the number of units."""

    @property
    def width(self) -> int:
        return self.importance.shape[1]

    def best(self, keep: int) -> Tensor:
        """Return the most important units, ascending, (layers * directions, keep)."""
        return self.importance.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values


def narrow_units(module: nn.Module, keep: Sequence[tuple[Recurrent, int]]) -> tuple[list[Change], dict[str, Tensor]]:
    """Leave only the most important units of recurrent layers, in place.

    Args:
        module: changed in place.
        keep: each layer, found in this module, and how many units stay in each of its layers and directions.

    Returns:
        What changed, and path of each layer that reads them to the columns that are left, as counted before.
    """
    changes = []
    stay: dict[str, Tensor] = {}
    for recurrent, count in keep:
        layer: Any = module.get_submodule(recurrent.path)
        before, kept = layer.hidden_size, recurrent.best(count)
        _cut(layer, kept)
        for path, name in recurrent.numbers:
            setattr(module.get_submodule(path), name, count)
        changes.append(Change(path=recurrent.path, what="hidden units", before=str(before), after=str(count)))
        for reader in recurrent.readers:
            columns = torch.ones(inputs_of(module.get_submodule(reader.path)), dtype=torch.bool)
            rows = torch.arange(len(kept)).unsqueeze(1) * before
            columns[reader.columns] = torch.isin(reader.units, (rows + kept).flatten())
            stay[reader.path] = stay.get(reader.path, True) & columns
    left = {path: columns.nonzero().flatten() for path, columns in stay.items()}
    changes += [_narrow_reader(module.get_submodule(path), path, columns) for path, columns in left.items()]
    return changes, left


def inputs_of(layer: Any) -> int:
    return int(layer.input_size if isinstance(layer, nn.RNNBase) else layer.in_features)


def suffixes(layer: Any) -> Iterator[tuple[int, int, str]]:
    """Yield row index, layer index and the suffix of the parameters' names, for each layer and direction."""
    directions = ["", "_reverse"] if layer.bidirectional else [""]
    for index in range(layer.num_layers):
        for way, direction in enumerate(directions):
            yield index * len(directions) + way, index, f"_l{index}{direction}"


def importance_of_units(module: nn.Module, layer: Any, rows: int, readers: list[Reader]) -> Tensor:
    """Return the sum of squares of the weights that write a unit and of those that read it."""
    width = layer.hidden_size
    total = torch.zeros(rows, width, dtype=torch.float64)
    directions = 2 if layer.bidirectional else 1
    for row, index, suffix in suffixes(layer):
        inputs, hidden = (getattr(layer, f"weight_{kind}{suffix}").detach().double().cpu() for kind in ("ih", "hh"))
        total[row] += inputs.square().sum(1).view(-1, width).sum(0) + hidden.square().sum(1).view(-1, width).sum(0)
        total[row] += hidden.square().sum(0)
        if index:  # what the layer below wrote
            below = inputs.square().sum(0).view(directions, width)
            total[(index - 1) * directions : index * directions] += below
    flat = total.view(-1)
    for reader in readers:
        part: Any = module.get_submodule(reader.path)
        for weight in _reading_weights(part):
            flat.index_add_(0, reader.units, weight.detach().double().cpu().square().sum(0)[reader.columns])
    return total


def _reading_weights(layer: Any) -> list[Tensor]:
    if isinstance(layer, nn.RNNBase):
        return [getattr(layer, f"weight_ih{suffix}") for _, index, suffix in suffixes(layer) if index == 0]
    return [layer.weight]


def _cut(layer: Any, kept: Tensor) -> None:
    """Remove units from a recurrent layer. kept: (layers * directions, units that stay)."""
    width, directions = layer.hidden_size, 2 if layer.bidirectional else 1
    offsets = torch.arange(directions).unsqueeze(1) * width
    for row, index, suffix in suffixes(layer):
        gates = getattr(layer, f"weight_hh{suffix}").shape[0] // width
        written = (torch.arange(gates).unsqueeze(1) * width + kept[row]).flatten()
        below = (offsets + kept[(index - 1) * directions : index * directions]).flatten() if index else None
        for name in (f"{kind}{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
            tensor = layer._parameters.get(name)
            if tensor is None:
                continue
            new = narrowed(tensor, 0, written)
            if name.startswith("weight_hh"):
                new = narrowed(new, 1, kept[row])
            elif name.startswith("weight_ih") and below is not None:
                new = narrowed(new, 1, below)
            setattr(layer, name, new)
    layer.hidden_size = kept.shape[1]


def _narrow_reader(layer: Any, path: str, columns: Tensor) -> Change:
    before = inputs_of(layer)
    if isinstance(layer, nn.RNNBase):
        for _, index, suffix in suffixes(layer):
            if index == 0:
                setattr(layer, f"weight_ih{suffix}", narrowed(getattr(layer, f"weight_ih{suffix}"), 1, columns))
        layer.input_size = len(columns)
    else:
        layer.weight = narrowed(layer.weight, 1, columns)
        layer.in_features = len(columns)
    return Change(path=path, what="input channels", before=str(before), after=str(len(columns)), indirect=True)


def ignore_units(module: nn.Module, recurrent: Recurrent, kept: Tensor) -> None:
    """Set every weight to zero that reads a removed unit."""
    layer: Any = module.get_submodule(recurrent.path)
    width, directions = layer.hidden_size, 2 if layer.bidirectional else 1
    gone = torch.ones(len(kept), width, dtype=torch.bool)
    gone.scatter_(1, kept, False)
    with torch.no_grad():
        for row, index, suffix in suffixes(layer):
            getattr(layer, f"weight_hh{suffix}")[:, gone[row]] = 0.0
            if index:
                below = gone[(index - 1) * directions : index * directions].flatten()
                getattr(layer, f"weight_ih{suffix}")[:, below] = 0.0
        for reader in recurrent.readers:
            for weight in _reading_weights(module.get_submodule(reader.path)):
                weight[:, reader.columns[gone.flatten()[reader.units]]] = 0.0
